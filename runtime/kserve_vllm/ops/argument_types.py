"""Kinds of numbers on the command line, for argparse's `type`: each says what it takes where it refuses."""

from __future__ import annotations

import argparse
import math


def number(text: str) -> float:
    """A number of at least 0."""
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError("must be a number of at least 0")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    if (value := number(text)) == 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def whole(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return value


def count(text: str) -> int:
    """A whole number of at least 1."""
    if (value := whole(text)) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def fraction(text: str) -> float:
    """A part that is never all: at least 0 and below 1."""
    if (value := number(text)) >= 1:
        raise argparse.ArgumentTypeError("must be at least 0 and below 1")
    return value


def share(text: str) -> float:
    """A part that is never nothing: above 0 and at most 1."""
    if not 0 < (value := number(text)) <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return value
