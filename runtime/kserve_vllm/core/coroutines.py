"""How a coroutine is run whose first step needs no task."""

from __future__ import annotations

import types
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


@types.coroutine
def resume(begun: Generator[object, object, T], waits_for: object) -> Generator[object, object, T]:
    """Go on, in a task, with an awaitable that was begun with `next` and waits for a future; what it returns."""
    while True:
        try:
            given, thrown = (yield waits_for), None
        except BaseException as error:
            given, thrown = None, error
        try:
            waits_for = begun.send(given) if thrown is None else begun.throw(thrown)
        except StopIteration as done:
            result: T = done.value
            return result
