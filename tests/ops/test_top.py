"""What `top` makes of two readings, and of a service's pods."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest

from kserve_vllm.cli import command as cli
from kserve_vllm.ops.top import command as top
from kserve_vllm.ops.top.view import ServerReading, read, view
from tests.ops.fake_api import FakeApi
from tests.support import wait_until

HEALTH = json.dumps({"ready": True, "live": True, "state": "ready", "seconds": 12.0})


def page(requests: int, tokens: int, firsts: tuple[int, int, int], cached: int = 0, running: int = 3) -> str:
    """A page of metrics, as far as `top` reads it."""
    labels = 'model="m",adapter="upper",tenant="blue",protocol="openai"'
    return "\n".join(
        [
            "# HELP vllm:num_requests_running running",
            f'vllm:num_requests_running{{engine="0"}} {running}.0',
            'vllm:num_requests_waiting{engine="0"} 2.0',
            'vllm:kv_cache_usage_perc{engine="0"} 0.25',
            f'kserve_vllm_requests_total{{outcome="ok",tenant="blue"}} {requests}',
            f"kserve_vllm_output_tokens_total{{{labels}}} {tokens}",
            f"kserve_vllm_prompt_tokens_total{{{labels}}} {2 * tokens}",
            f"kserve_vllm_cached_prompt_tokens_total{{{labels}}} {cached}",
            f'kserve_vllm_time_to_first_token_seconds_bucket{{le="0.1",model="m"}} {firsts[0]}',
            f'kserve_vllm_time_to_first_token_seconds_bucket{{le="1.0",model="m"}} {firsts[1]}',
            f'kserve_vllm_time_to_first_token_seconds_bucket{{le="+Inf",model="m"}} {firsts[2]}',
            'kserve_vllm_waiting_requests{priority="0"} 1',
            'kserve_vllm_waiting_requests{priority="2"} 4',
            'kserve_vllm_adapters{state="loaded"} 2',
        ]
    )


def reading(at: float, text: str, group: str = "") -> ServerReading:
    """A reading at a time of its own."""
    found = read(lambda path: (200, HEALTH if path.startswith("/v2") else text), group)
    return ServerReading(at, found.health, found.metrics, group=group)


def test_rates_and_quantiles_are_of_the_time_between() -> None:
    before, after = reading(0.0, page(10, 1000, (5, 5, 5))), reading(2.0, page(14, 1200, (5, 9, 9), cached=100))
    found = view([(before, after)])
    assert (found.state, found.running, found.waiting) == ("ready", 3, 2)
    assert (found.requests_per_s, found.output_per_s, found.prompt_per_s) == (2, 100, 200)
    assert found.first_token_s["p50"] == pytest.approx(0.55)
    assert found.prefix_hits == pytest.approx(100 / 400)
    assert found.queued == {"interactive": 1, "batch": 4}
    assert found.tenants == {"blue": 300}
    assert found.adapters == {"upper": 300}
    assert found.adapter_states == {"loaded": 2}


def test_a_counter_that_fell_began_anew() -> None:
    found = view([(reading(0.0, page(10, 1000, (0, 0, 0))), reading(1.0, page(3, 50, (0, 0, 0))))])
    assert (found.requests_per_s, found.output_per_s) == (3, 50)


def test_what_is_missing_is_said() -> None:
    gone = read(lambda path: (0, "connection refused"))
    assert view([(gone, gone)]).state == "gone"
    behind = read(lambda path: (200, HEALTH) if path.startswith("/v2") else (404, "{}"))
    found = view([(behind, behind)])
    assert found.output_per_s is None
    assert "--admin-port" in found.error


@pytest.mark.parametrize(
    "page",
    [
        "vllm:kv_cache_usage_perc NaN\nvllm:num_requests_running +Inf\nkserve_vllm_output_tokens_total NaN\n",
        'kserve_vllm_time_to_first_token_seconds_bucket{le="+Inf"} 5\n',
        'kserve_vllm_time_to_first_token_seconds_bucket{le="soon"} 5\n'
        "kserve_vllm_time_to_first_token_seconds_bucket 3\n",
        "<html>\n{}{}\na b c\n",
    ],
    ids=["no number", "one bucket", "no bound", "a page"],
)
def test_what_another_server_says_is_left_out(page: str) -> None:
    def get(path: str) -> tuple[int, str]:
        odd = {"ready": True, "state": None, "seconds": "soon"}
        return 200, json.dumps(odd) if path.endswith("ready") else page

    before = read(lambda path: (200, "kserve_vllm_output_tokens_total 0\n" if path == "/metrics" else "{}"))
    seen = view([(before, read(get))])
    assert (seen.kv_used, seen.running, seen.first_token_s, seen.state_s) == (None, None, {}, 0.0)
    json.dumps(seen.machine(), allow_nan=False)


def test_shares_of_both_modes() -> None:
    traffic = [{"revisionName": "a-1", "percent": 90}, {"revisionName": "a-2", "percent": 10, "latestRevision": True}]
    knative: dict[str, Any] = {"status": {"components": {"predictor": {"traffic": traffic}}}}
    assert top.shares(knative) == {"a-1": 90, "a-2": 10}
    standard = {"spec": {"canary": [{"trafficPercent": 20, "predictor": {"name": "canary"}}]}}
    assert top.shares(standard) == {"stable": 80, "canary": 20}


def pod(name: str, ready: bool, revision: str) -> dict[str, Any]:
    """A pod of the service."""
    state = {"running": {}} if ready else {"waiting": {"reason": "ImagePullBackOff"}}
    return {
        "metadata": {
            "name": name,
            "labels": {"serving.kserve.io/inferenceservice": "chat", "serving.knative.dev/revision": revision},
        },
        "spec": {},
        "status": {"phase": "Running", "containerStatuses": [{"name": "kserve-container", "state": state}]},
    }


def test_all_pods_of_a_service(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    traffic = [{"revisionName": "chat-1", "percent": 80}, {"revisionName": "chat-2", "percent": 20}]
    api.put(
        "InferenceService",
        {"metadata": {"name": "chat"}, "status": {"components": {"predictor": {"traffic": traffic}}}},
    )
    for name, ready, revision in (("a", True, "chat-1"), ("b", True, "chat-2"), ("c", False, "chat-2")):
        api.put("Pod", pod(name, ready, revision))
        api.pages[f"{name}/v2/health/ready"] = (200, HEALTH)
        api.pages[f"{name}/metrics"] = (200, page(1, 10, (0, 0, 0), running=2))
    assert cli.main(["top", "chat", "--once", "--json", "--interval", "0.2"]) == 1, "one is not ready"
    found = json.loads(capsys.readouterr().out)
    assert found["traffic_percent"] == {"chat-1": 80, "chat-2": 20}
    assert found["total"]["pods"] == [3, 2]
    assert found["total"]["running"] == 4
    assert found["total"]["state"] == "kserve-container: ImagePullBackOff"
    assert set(found["groups"]) == {"chat-1", "chat-2"}
    assert found["servers"]["a"]["running"] == 2
    assert not api.writes
    assert cli.main(["top", "chat", "--once", "--interval", "0.2"]) == 1
    text = capsys.readouterr().out
    assert "chat-1 80 %" in text
    assert "2 of 3 pods ready" in text


def test_exit_codes(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "nothing", "--once", "--interval", "0.2"]) == 3
    assert cli.main(["top", "http://127.0.0.1:9", "--once", "--interval", "0.2"]) == 3
    assert cli.main(["top", "http://127.0.0.1:9", "--interval", "0"]) == 2
    assert cli.main(["top", "chat", "--metrics-url", "http://x"]) == 2


class Pages(BaseHTTPRequestHandler):
    """A server, as far as `top` asks it."""

    def do_GET(self) -> None:
        body = (HEALTH if self.path.startswith("/v2") else page(1, 10, (0, 0, 0))).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


_SHELL = """
import os, signal, sys
child = os.fork()
if not child:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background
    os.execv(sys.executable, [sys.executable, "-m", "kserve_vllm", "top", *sys.argv[1:]])
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(code if code >= 0 else 128 - code)
"""
"""A job in the foreground of a session whose leader waits, without which ^Z stops nobody."""


class OnATerminal:
    """`kserve-vllm top` on a terminal of its own, as a shell starts it."""

    def __init__(self, url: str, columns: int = 80, term: str = "xterm") -> None:
        self.main, self.side = pty.openpty()
        fcntl.ioctl(self.side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.before = termios.tcgetattr(self.side)
        variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SHELL, url, "--interval", "0.2"],
            stdin=self.side,
            stdout=self.side,
            stderr=self.side,
            env={**variables, "TERM": term},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.seen = b""

    def until(self, sign: bytes, after: int = 0) -> None:
        """Read until the terminal was sent this, after so much else."""
        deadline = time.monotonic() + 30
        while sign not in self.seen[after:]:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.main], [], [], 0.2)[0]:
                self.seen += os.read(self.main, 65536)

    @property
    def job(self) -> psutil.Process:
        """The process of `top`."""
        return psutil.Process(self.process.pid).children()[0]

    def ended(self) -> int:
        """Its exit code."""
        deadline = time.monotonic() + 30
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            if select.select([self.main], [], [], 0.05)[0]:
                self.seen += os.read(self.main, 65536)
        while select.select([self.main], [], [], 0.05)[0]:
            self.seen += os.read(self.main, 65536)
        return int(self.process.returncode)

    def close(self) -> None:
        """End it, and the terminal."""
        if self.process.poll() is None:
            for each in (*psutil.Process(self.process.pid).children(), self.process):
                each.kill()
            self.process.wait()
        os.close(self.main)
        os.close(self.side)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"
CURSOR = b"\x1b[?25h"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("how", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        (signal.SIGQUIT, 131),
        (b"\x03", 0),
        (b"q", 0),
        (b"\x1b", 0),
    ],
)
def test_the_terminal_is_left_as_it_was(url: str, how: signal.Signals | bytes, code: int) -> None:
    found = OnATerminal(url, 20)
    try:
        found.until(b"tokens")
        assert termios.tcgetattr(found.side) != found.before
        os.write(found.main, b"\x1b[A")  # an arrow key ends nothing
        found.until(b"tokens", len(found.seen))
        fcntl.ioctl(found.side, termios.TIOCSWINSZ, struct.pack("HHHH", 2, 5, 0, 0))
        found.job.send_signal(signal.SIGWINCH)
        found.until(b"\x1b[J", len(found.seen))
        if isinstance(how, bytes):
            os.write(found.main, how)
        else:
            found.job.send_signal(how)
        assert found.ended() == code
        assert found.seen.count(ENTER) == found.seen.count(LEAVE) == 1
        assert found.seen.rindex(LEAVE) > found.seen.rindex(CURSOR) > found.seen.rindex(b"\x1b[J")
        assert termios.tcgetattr(found.side) == found.before
    finally:
        found.close()


@pytest.mark.integration
def test_it_is_stopped_and_goes_on(url: str) -> None:
    found = OnATerminal(url)
    try:
        found.until(b"tokens")
        os.write(found.main, b"\x1a")
        found.until(LEAVE)
        wait_until(lambda: found.job.status() == psutil.STATUS_STOPPED, 10, "it was not stopped")
        assert termios.tcgetattr(found.side) == found.before
        found.job.send_signal(signal.SIGCONT)
        found.until(ENTER, found.seen.index(LEAVE))
        found.until(b"tokens", len(found.seen))
        os.write(found.main, b"q")
        assert found.ended() == 0
        assert found.seen.endswith(LEAVE)
        assert termios.tcgetattr(found.side) == found.before
    finally:
        found.close()


@pytest.mark.integration
def test_a_terminal_that_can_not_be_drawn_on_gets_lines(url: str) -> None:
    found = OnATerminal(url, term="dumb")
    try:
        found.until(b"tokens")
        assert termios.tcgetattr(found.side) == found.before
        found.job.terminate()
        assert found.ended() == 143
        assert b"\x1b" not in found.seen
    finally:
        found.close()
