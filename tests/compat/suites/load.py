"""Load generators in Go: vegeta over HTTP/1.1 and HTTP/2, ghz over gRPC. Every answer is looked at, none may fail.

How fast answers come is no matter here: `make bench` measures that.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.compat.base import RUN_WITHIN_S, Case, Folder, Suite, Target, one_line
from tests.compat.suites.clients import describe_v2

_VEGETA = ("github.com/tsenart/vegeta/v12", "v12.13.0")
_GHZ = ("github.com/bojand/ghz/cmd/ghz", "v0.93.0")
_QUESTION = "What is 2 + 3?"
_REQUESTS, _AT_ONCE = 60, 8
_HTTP: dict[str, tuple[str, dict[str, object], Callable[[bytes], bool]]] = {
    "V2 infer": (
        "/v2/models/{model}/infer",
        {
            "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [_QUESTION]}],
            "parameters": {"max_tokens": 8, "ignore_eos": True},
        },
        lambda body: bool(json.loads(body)["outputs"][0]["data"][0]),
    ),
    "V2 generate": (
        "/v2/models/{model}/generate",
        {"text_input": _QUESTION, "parameters": {"max_tokens": 8, "ignore_eos": True}},
        lambda body: bool(json.loads(body)["text_output"]),
    ),
    "a chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 8},
        lambda body: json.loads(body)["usage"]["completion_tokens"] > 0,
    ),
    "a streamed chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 8, "stream": True},
        lambda body: b'"content":' in body and body.endswith(b"data: [DONE]\n\n"),
    ),
}
"""Path, body, and what a good answer holds."""


def _told(command: Sequence[str], given: bytes = b"") -> bytes:
    done = subprocess.run(command, input=given, capture_output=True, timeout=RUN_WITHIN_S, check=False)
    if done.returncode:
        raise RuntimeError(one_line(done.stderr.decode(errors="replace")[-300:]))
    return done.stdout


def _attack(vegeta: Path, target: Target, name: str, *options: str) -> Case:
    path, body, good = _HTTP[name]
    sent = json.dumps({"model": target.model, **body} if path.startswith("/v1/") else body)
    wanted = {
        "method": "POST",
        "url": target.url + path.format(model=target.model),
        "header": {"Content-Type": ["application/json"]},
        "body": base64.b64encode(sent.encode()).decode(),
    }
    line = json.dumps(wanted).encode() + b"\n"
    rate = [
        "-rate",
        f"{_REQUESTS // 4}/1s",
        "-duration",
        "4s",
        "-workers",
        str(_AT_ONCE),
        "-max-workers",
        str(_AT_ONCE),
    ]
    raw = _told([str(vegeta), "attack", "-format", "json", "-timeout", "120s", *rate, *options], line)
    hits = [json.loads(each) for each in _told([str(vegeta), "encode", "-to", "json"], raw).splitlines()]
    bad = [each for each in hits if each["code"] != 200 or not good(base64.b64decode(each["body"] or ""))]
    detail = ""
    if bad:
        body_of = base64.b64decode(bad[0]["body"] or "").decode(errors="replace")
        detail = f"{len(bad)} of {len(hits)}: {bad[0]['code']} {bad[0]['error']} {body_of}"
    elif len(hits) != _REQUESTS:
        detail = f"{len(hits)} requests were made, not {_REQUESTS}"
    return Case(f"{name}{' over HTTP/2' if options else ''}", "failed" if detail else "passed", one_line(detail))


def _vegeta(target: Target, folder: Path) -> list[Case]:
    program = Folder(folder / "vegeta").go(*_VEGETA)
    return [_attack(program, target, name, *options) for name in _HTTP for options in ((), ("-h2c",))]


def _ghz(target: Target, folder: Path) -> list[Case]:
    where = Folder(folder / "ghz")
    program = where.go(*_GHZ)
    describe_v2(where.path)
    text = base64.b64encode(_QUESTION.encode()).decode()
    asked: dict[str, Any] = {
        "model_name": target.model,
        "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": ["1"], "contents": {"bytes_contents": [text]}}],
        "parameters": {"max_tokens": {"int64_param": "8"}},
    }
    streamed = {
        **asked,
        "inputs": [
            *asked["inputs"],
            {"name": "stream", "datatype": "BOOL", "shape": ["1"], "contents": {"bool_contents": [True]}},
        ],
    }
    described = ["--protoset", str(where.path / "v2.bin")]
    cases = []
    for name, method, data, how in (
        ("ModelInfer", "ModelInfer", asked, described),
        ("ModelStreamInfer", "ModelStreamInfer", [streamed], described),
        ("ServerLive", "ServerLive", {}, described),
        ("described by reflection", "ModelInfer", asked, []),
    ):
        command = [str(program), "--insecure", *how, "--call", f"inference.GRPCInferenceService.{method}"]
        command += ["-d", json.dumps(data), "-n", str(_REQUESTS), "-c", str(_AT_ONCE), "--connections", "2"]
        try:
            found = json.loads(_told([*command, "-t", "120s", "-O", "json", target.grpc]))
            codes = found["statusCodeDistribution"]
            detail = "" if codes == {"OK": _REQUESTS} else f"{codes} {found.get('errorDistribution')}"
        except RuntimeError as error:
            detail = str(error)
        cases.append(Case(name, "failed" if detail else "passed", one_line(detail)))
    return cases


SUITES = [
    Suite(
        "vegeta",
        "load of Go's HTTP client, HTTP/1.1 and HTTP/2: V2 and chats, each answer whole",
        f"Go {'@'.join(_VEGETA)}",
        _vegeta,
    ),
    Suite("ghz", "load of grpc-go: V2 over gRPC, unary and streamed", f"Go {'@'.join(_GHZ)}", _ghz),
]
