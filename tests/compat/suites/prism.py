"""Prism between a client and the server: requests and answers are judged by OpenAI's own description of its API.

The description is no part of this tree. It is taken from OpenAI's repository in the version named here, or from a file:

    OPENAI_OPENAPI=openapi.json python -m tests.compat --only prism
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.compat.base import Case, Folder, NotInstalled, Suite, Target, one_line
from tests.support import end, free_port, wait_until

_PINNED = "@stoplight/prism-cli@5.16.0"
_COMMIT = "f85dbe223d40e1a31cba812ab2d755c7e98a92a3"
_SHA256 = "bbfd19abcde0e7412da99378deb2a959ccdd3a812f97c9e35901921e8e973f9a"
_SOURCE = f"https://raw.githubusercontent.com/openai/openai-openapi/{_COMMIT}/openapi.json"
FILE = "OPENAI_OPENAPI"
_VIOLATIONS = "sl-violations"

_ASKED = {"messages": [{"role": "user", "content": "What is 2 + 3?"}]}
_SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
_AS_JSON = {"response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": _SCHEMA}}}
_SPOKEN = {"prompt": "What is 2 + 3?", "max_tokens": 8}
_CASES: dict[str, tuple[str, str, Mapping[str, Any] | None, int]] = {
    "models": ("GET", "/models", None, 200),
    "a model": ("GET", "/models/{model}", None, 200),
    "a model that is not there": ("GET", "/models/nobody", None, 404),
    "a chat": ("POST", "/chat/completions", {**_ASKED, "max_completion_tokens": 8}, 200),
    "a chat with all that a client may say": (
        "POST",
        "/chat/completions",
        {
            **_ASKED,
            "max_tokens": 8,
            "n": 2,
            "temperature": 1,
            "top_p": 0.9,
            "logprobs": True,
            "top_logprobs": 2,
            "seed": 1,
            "stop": ["x"],
            "user": "me",
            "metadata": {"a": "b"},
            "presence_penalty": 0.1,
            "frequency_penalty": 0.1,
        },
        200,
    ),
    "a chat with JSON under a schema": ("POST", "/chat/completions", {**_ASKED, **_AS_JSON, "max_tokens": 32}, 200),
    "a streamed chat": (
        "POST",
        "/chat/completions",
        {**_ASKED, "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}},
        200,
    ),
    "a chat that is cut": ("POST", "/chat/completions", {**_ASKED, "max_tokens": 1}, 200),
    "a chat of a model that is not there": ("POST", "/chat/completions", {**_ASKED, "model": "nobody"}, 404),
    "a completion": ("POST", "/completions", _SPOKEN, 200),
    "completions with log-probabilities": ("POST", "/completions", {**_SPOKEN, "n": 2, "logprobs": 2}, 200),
    "a completion that repeats its prompt": ("POST", "/completions", {**_SPOKEN, "echo": True}, 200),
    "a response": ("POST", "/responses", {"input": "What is 2 + 3?", "max_output_tokens": 16}, 200),
    "a response with instructions and metadata": (
        "POST",
        "/responses",
        {
            "input": [{"role": "user", "content": "What is 2 + 3?"}],
            "instructions": "Be short.",
            "metadata": {"a": "b"},
            "temperature": 0,
            "max_output_tokens": 16,
        },
        200,
    ),
    "a streamed response": (
        "POST",
        "/responses",
        {"input": "What is 2 + 3?", "max_output_tokens": 16, "stream": True},
        200,
    ),
    "a response that is not there": ("GET", "/responses/resp_nobody", None, 404),
    "files": ("GET", "/files", None, 200),
    "batches": ("GET", "/batches", None, 200),
    "a batch that is not there": ("GET", "/batches/batch_nobody", None, 404),
}
"""Method, path, body and the status to be answered. OpenAI describes no errors: of those the status alone counts."""


def _description(folder: Path) -> Path:
    """OpenAI's description.

    Raises:
        NotInstalled: it can't be had, or is of another version.
    """
    path = Path(os.environ.get(FILE) or folder / "openai-openapi.json")
    if FILE not in os.environ and not path.is_file():
        try:
            answer = httpx.get(_SOURCE, timeout=60, follow_redirects=True).raise_for_status()
        except httpx.HTTPError as error:
            raise NotInstalled(
                f"OpenAI's description can't be had from its repository here ({error}): "
                f"{FILE} names a copy of its openapi.json of {_COMMIT[:12]}"
            ) from error
        path.write_bytes(answer.content)
    if not path.is_file():
        raise NotInstalled(f"{FILE}: there is no file {path}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise NotInstalled(f"{path.name} is not OpenAI's openapi.json of {_COMMIT[:12]}, which the list is made for")
    return path


@contextlib.contextmanager
def _prism(target: Target, folder: Path) -> Iterator[str]:
    """The proxy's URL."""
    description = _description(folder)
    program = Folder(folder / "prism").node(_PINNED) / "node_modules" / ".bin" / "prism"
    port = free_port()
    command = [str(program), "proxy", str(description.resolve()), f"{target.url}/v1", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            try:
                return httpx.get(f"{url}/models", headers=_HEADERS, timeout=10).status_code == 200
            except httpx.TransportError:
                return False

        def said() -> str:
            log.seek(0)
            return f"Prism does not answer: {log.read().decode(errors='replace')[-500:]}"

        try:
            wait_until(answers, 180, said)
            yield url
        finally:
            end(process, 10)


_HEADERS = {"Authorization": "Bearer none"}


def _judged(name: str, ask: Callable[[], httpx.Response], status: int) -> Case:
    answer = ask()
    detail = ""
    if answer.status_code != status:
        detail = f"{answer.status_code}: {answer.text}"
    elif status == 200 and _VIOLATIONS in answer.headers:
        found = json.loads(answer.headers[_VIOLATIONS])
        detail = "; ".join(f"{'.'.join(map(str, each['location']))}: {each['message']}" for each in found)
    return Case(name, "failed" if detail else "passed", one_line(detail))


def _run(target: Target, folder: Path) -> list[Case]:
    cases = []
    with _prism(target, folder) as url, httpx.Client(base_url=url, headers=_HEADERS, timeout=120) as client:
        for name, (method, path, body, status) in _CASES.items():
            sent = None if body is None else {"model": target.model, **body}

            def ask(method: str = method, path: str = path, sent: object = sent) -> httpx.Response:
                return client.request(method, path.format(model=target.model), json=sent)

            cases.append(_judged(name, ask, status))
    return cases


SUITES = [
    Suite(
        "prism",
        "Prism as a validating proxy in front: each request and answer judged by OpenAI's description",
        f"npm {_PINNED}, OpenAI's openapi.json of {_COMMIT[:12]}",
        _run,
    )
]
