"""A short run of the fuzzer with fixed seeds; `make fuzz MINUTES=10` runs it for longer."""

from __future__ import annotations

import pytest

from tests.robustness.fuzz import TARGETS


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_made_up_input_does_no_harm(name: str) -> None:
    for number in range(2):
        TARGETS[name].run(number, 60)
