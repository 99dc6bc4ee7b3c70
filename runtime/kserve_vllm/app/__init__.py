"""Builds every object, and runs the process: signals, start, drain, stop."""
