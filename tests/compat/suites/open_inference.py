"""schemathesis over the Open Inference Protocol's REST description, as MLServer's wheel carries it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.errors import UnsupportedSchema

from tests.compat.base import Case, Folder, Suite, Target, one_line

_PINNED = "mlserver==1.7.1"
_EXAMPLES = 25


def problems_of(operation: Any, target: Target) -> list[str]:
    """Answers to made-up requests of an operation that are a server's failure, or not of the described shape.

    Every second request names what exists, so that it comes further than the look-up of the model.
    """
    problems: list[str] = []
    exists = {"model_name": target.model, "model_version": "1"}

    @settings(
        max_examples=_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=GenerationMode.POSITIVE), st.booleans())
    def ask(case: Any, known: bool) -> None:
        if known:
            case.path_parameters = {n: exists.get(n, value) for n, value in (case.path_parameters or {}).items()}
        answer = case.call(base_url=target.url, timeout=60)
        if answer.status_code >= 500:
            problems.append(f"{answer.status_code}: {answer.text[:200]}")
        elif answer.status_code < 300 and "json" in answer.headers.get("content-type", [""])[0]:
            try:
                case.operation.validate_response(answer)
            except Exception as error:
                problems.append(str(error))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ask()
        except Unsatisfiable:
            problems.append("no request can be made from the description")
    return problems


def _run(target: Target, folder: Path) -> list[Case]:
    found = Folder(folder / "open-inference").unpacked(_PINNED, "--only-binary", ":all:")
    (file,) = found.rglob("rest/openapi/dataplane.json")
    schema = schemathesis.openapi.from_dict(json.loads(file.read_text()))
    cases = []
    for result in schema.get_all_operations():
        operation = result.ok()
        try:
            problems = problems_of(operation, target)
        except UnsupportedSchema as error:
            problems = [f"schemathesis makes no request of its description: {error}"]
        cases.append(Case(operation.label, "failed" if problems else "passed", one_line(" ".join(problems[:1]))))
    return cases


SUITES = [
    Suite(
        "open-inference",
        "the Open Inference Protocol's REST description: each operation below 500 and in the described shape",
        f"PyPI schemathesis 4.32.5, description of {_PINNED}",
        _run,
    )
]
