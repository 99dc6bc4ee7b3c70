"""Promises of the README and the chart, shown on a real cluster; see `make e2e` and conftest.py."""
