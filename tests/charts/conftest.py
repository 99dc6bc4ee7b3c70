"""Options and fixtures of the chart's tests.

pytest tests/charts                   compare with the golden files
pytest tests/charts --update-golden   write them anew; read the difference before you commit it
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden renders of the catalogue anew")


@pytest.fixture(scope="session")
def update_golden(request: pytest.FixtureRequest) -> bool:
    """True when the golden files are to be written and not compared."""
    return bool(request.config.getoption("--update-golden", default=False))
