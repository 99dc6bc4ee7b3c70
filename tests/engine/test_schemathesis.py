"""Whatever fits the OpenAPI document, or just misses it, is answered below 500."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode

from tests.clients import assert_unharmed
from tests.support import Server

# Half of the requests ask for what exists, so that they come further than the look-up of the model.
_EXISTS = {"model_name": "demo", "model_version": "1"}
# Where each protocol keeps the number of tokens; a text up to the context's end takes a second.
_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")

# The same examples in every run, unless a seed asks for others.
EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "25"))
SEED = os.environ.get("SCHEMATHESIS_SEED")

LEFT_OUT = {
    "POST /v2/repository/models/{model_name}/unload": "would unload the model under the other operations",
}


def aim(case: Case, exists: bool) -> Case:
    """Name the model that is served, where `exists`, and ask for few tokens."""
    if exists:
        case.path_parameters = {name: _EXISTS.get(name, value) for name, value in (case.path_parameters or {}).items()}
    if isinstance(case.body, dict):
        if exists and "model" in case.body:
            case.body["model"] = "demo"
        few = case.body.setdefault("parameters", {}) if "{model_name}" in case.operation.path else case.body
        if isinstance(few, dict) and not any(few.get(name) for name in _TOKENS):
            few["max_output_tokens" if case.operation.path == "/v1/responses" else "max_tokens"] = 4
    return case


def statuses(server: Server, operation: Any, mode: GenerationMode) -> dict[int, str]:
    """Status codes that an operation answered, each with the first request that led to it."""
    found: dict[int, str] = {}

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=SEED is None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode), st.booleans())
    def ask(case: Case, exists: bool) -> None:
        case = aim(case, exists)
        answer = case.call(base_url=server.url, timeout=60)
        found.setdefault(answer.status_code, f"{case.as_curl_command()}\n{answer.text[:300]}")

    with contextlib.suppress(Unsatisfiable):  # an operation without any input has no wrong one
        seed(int(SEED))(ask)() if SEED is not None else ask()
    return found


@pytest.mark.timeout(900)
# Where a form has a file in it, schemathesis draws the form's boundary so.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_operation_answers_below_500(server: Server, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    asked, faults = 0, []
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.label in LEFT_OUT:
            continue
        found = statuses(server, operation, mode)
        asked += bool(found)
        faults += [f"{operation.label} answered {status}:\n{how}" for status, how in found.items() if status >= 500]
    assert asked > 20
    assert_unharmed(server)
    assert not faults, "\n\n".join(faults)
