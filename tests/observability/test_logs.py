"""What a log line holds, in which form it comes, and what it never holds."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest

from kserve_vllm.core.request_context import RequestContext, Trace, current
from kserve_vllm.telemetry import logs
from tests.clients import until
from tests.observability.conftest import KEY
from tests.observability.load import LONG, PROMPT, SECRET_WORD, Client
from tests.support import Server


def lines(server: Server) -> list[dict[str, Any]]:
    """Every line of the log that is a JSON object."""
    return [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]


def request_lines(server: Server, request_id: str) -> list[dict[str, Any]]:
    """The lines of one finished request."""
    return [line for line in lines(server) if line["event"] == "request" and line["request_id"] == request_id]


def test_a_finished_request_leaves_one_line_with_who_what_and_how_long(observed: Server) -> None:
    trace = "7bf92f3577b34da6a3ce929d0e0e4736"
    usage = (
        Client(observed, KEY)
        .chat(x_request_id="log-test-1", traceparent=f"00-{trace}-00f067aa0ba902b7-01")
        .json()["usage"]
    )
    until(lambda: bool(request_lines(observed, "log-test-1")), 3)
    (line,) = request_lines(observed, "log-test-1")
    assert line["trace_id"] == trace
    expected = {
        "level": "info",
        "protocol": "openai",
        "endpoint": "/v1/chat/completions",
        "model": "demo",
        "tenant": "none",
        "outcome": "ok",
        "status": 200,
        "finish_reasons": ["length"],
        "prompt_tokens": usage["prompt_tokens"],
        "output_tokens": LONG["max_tokens"],
    }
    assert {key: line[key] for key in expected} == expected
    assert 0 < line["ttft_s"] < line["duration_s"]
    assert 0 <= line["queue_s"] < line["ttft_s"]
    assert line["itl_s"] > 0


@pytest.mark.parametrize("ask", ["infer", "generate", "predict", "grpc_infer"])
def test_every_protocol_leaves_its_line(ask: str, observed: Server) -> None:
    name = f"log-test-{ask}"
    getattr(Client(observed, KEY), ask)(**{"x_request_id" if ask != "grpc_infer" else "x-request-id": name})
    until(lambda: bool(request_lines(observed, name)), 3)
    (line,) = request_lines(observed, name)
    assert line["outcome"] == "ok"
    assert line["output_tokens"] == LONG["max_tokens"] * (2 if ask == "infer" else 1)


def test_a_refused_request_says_why(observed: Server) -> None:
    assert Client(observed).predict(x_request_id="log-test-refused").status_code == 401
    until(lambda: bool(request_lines(observed, "log-test-refused")), 3)
    (line,) = request_lines(observed, "log-test-refused")
    assert (line["outcome"], line["reason"], line["status"]) == ("refused", "unauthenticated", 401)


def test_neither_a_prompt_nor_a_key_is_in_the_log(observed: Server) -> None:
    client = Client(observed, KEY)
    client.everything()
    # Requests that fail in ways which tempt to show them.
    client.post("/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": PROMPT}], "n": "x"})
    client.post("/v1/completions", {"model": "demo", "prompt": PROMPT * 400})
    client.post("/v2/models/demo/infer", {"inputs": [{"name": PROMPT, "datatype": "BYTES", "shape": [1], "data": [1]}]})
    client.post("/v1/models/demo:predict", {"instances": [{"prompt": PROMPT, "no_such_option": 1}]})
    client.post("/v2/models/demo/generate", {"text_input": PROMPT, "parameters": {"max_tokens": -1}})
    Client(observed, KEY + "x").chat()
    text = observed.log
    assert SECRET_WORD not in text
    assert KEY not in text
    assert "/v1/chat/completions" in text


def test_lines_of_vllm_and_its_processes_and_of_uvicorn_have_the_same_form(observed: Server) -> None:
    found = lines(observed)
    loggers = {line["logger"].split(".")[0] for line in found}
    assert {"kserve_vllm", "vllm", "uvicorn"} <= loggers
    processes = {line.get("process") for line in found if line["logger"].startswith("vllm.")}
    assert "EngineCore" in processes
    assert any(str(process).startswith(("Worker", "VllmWorker")) for process in processes)
    for line in found:
        assert {"timestamp", "level", "logger", "event"} <= set(line)
    # What is left: progress bars, and torch's own lines from C++ and from a handler that it installs by itself.
    rest = [line for line in observed.log.splitlines() if line and not line.startswith("{")]
    assert not [line for line in rest if line.startswith(("INFO", "WARNING", "ERROR", "Traceback"))], rest


def test_prompts_are_logged_where_vllms_switch_and_level_ask_for_it(talkative: Server) -> None:
    assert Client(talkative).chat(x_request_id="shown").status_code == 200
    until(lambda: SECRET_WORD in talkative.log, 5)
    (line, *_) = [line for line in lines(talkative) if SECRET_WORD in line["event"]]
    assert line["logger"].startswith("vllm.")
    assert line["request_id"] == "shown"


# Without an engine


def formatted(chosen: str, record: logging.LogRecord) -> str:
    """One record in the form."""
    return logs.formatter(chosen).format(record)


def record(message: str, *args: Any, exc_info: Any = None) -> logging.LogRecord:
    """A line of some library."""
    return logging.LogRecord("some.library", logging.WARNING, "f.py", 1, message, args, exc_info)


def test_json_has_one_line_also_for_a_traceback() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        text = formatted("json", record("it is %s", "bad", exc_info=sys.exc_info()))
    assert "\n" not in text
    line = json.loads(text)
    assert line["event"] == "it is bad"
    assert "ValueError: broken" in line["exception"]


def test_a_line_written_for_a_request_carries_its_ids() -> None:
    token = current.set(RequestContext("r-1", "v2", "/x", trace=Trace("ab" * 16)))
    try:
        line = json.loads(formatted("json", record("x")))
    finally:
        current.reset(token)
    assert (line["request_id"], line["trace_id"]) == ("r-1", "ab" * 16)
    assert "request_id" not in json.loads(formatted("json", record("x")))


def test_the_console_form_is_for_people() -> None:
    text = formatted("console", record("it is %s", "bad"))
    assert not text.startswith("{")
    assert "it is bad" in text
    assert "warning" in text


def test_auto_is_console_on_a_terminal_and_json_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert logs.form("auto") == "console"
    assert logs.form("json") == "json"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert logs.form("auto") == "json"


def test_the_file_for_vllms_processes_is_removed_and_an_operators_own_stays() -> None:
    code = (
        "import os; from kserve_vllm.telemetry import logs\n"
        "before = os.environ.get('VLLM_LOGGING_CONFIG_PATH')\n"
        "logs.configure('json'); path = os.environ['VLLM_LOGGING_CONFIG_PATH']\n"
        "assert os.path.exists(path) or before; logs.forget(); print(path, os.path.exists(path))\n"
    )
    environ = {k: v for k, v in os.environ.items() if k != "VLLM_LOGGING_CONFIG_PATH"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(" False")
    environ["VLLM_LOGGING_CONFIG_PATH"] = __file__
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{__file__} True"
