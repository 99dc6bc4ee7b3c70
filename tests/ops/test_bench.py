"""The benchmark: what it counts, what it compares, and what it says to a script."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kserve_vllm.cli import command as cli
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops import simulate
from kserve_vllm.ops.bench import clients, command, compare, load, result
from kserve_vllm.ops.bench.clients import LoadAnswer, LoadTarget
from kserve_vllm.ops.bench.load import Played, Point
from kserve_vllm.ops.bench.prompts import FromFile, LoadPrompt, PromptShape, WordCount
from kserve_vllm.ops.model import measured
from kserve_vllm.ops.pictures import draw_bench

KEY = "key-that-nothing-may-print-0815"


class Stub:
    """A server that answers chats as it is told. It stands for the wire alone: no model, and every token at once."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.status, self.events = 200, list[bytes]()
        self.cut = False
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # as in `fake_api`

            def do_GET(self) -> None:
                self._answer(200, json.dumps({"data": [{"id": "m"}]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                stub.bodies.append(body)
                stub.keys.add(self.headers.get("authorization"))
                if stub.status != 200:
                    self._answer(stub.status, b'{"error": {"message": "no room"}}')
                    return
                words = len(body["messages"][0]["content"].split()) * 2 + 5
                usage = {"prompt_tokens": words, "completion_tokens": body["max_tokens"]}
                if not body["stream"]:
                    whole = {"choices": [{"message": {"content": "x"}, "text": "x"}], "usage": usage}
                    self._answer(200, json.dumps(whole).encode())
                    return
                first = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
                piece = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'
                last = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"
                last = b"" if stub.cut else last
                self._answer(200, first + (b"".join(stub.events) or piece * body["max_tokens"]) + last)

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Close the port."""
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    running = Stub()
    yield running
    running.stop()


def bench(stub: Stub, *words: str) -> int:
    """The exit code of a short benchmark."""
    return cli.main(["bench", stub.url, "--concurrency", "2", "--requests", "6", "--output", "4", "-q", *words])


def made(point: Point, firsts: list[float], gap: float, tokens: int, error: str = "") -> Played:
    """Answers with these first tokens, sent a second apart."""
    answers = [
        LoadAnswer(at, at + first + gap * (tokens - 1), [at + first + gap * i for i in range(tokens)], 10, tokens, None)
        for at, first in enumerate(firsts)
    ]
    if error:
        answers.append(LoadAnswer(99.0, 99.1, error=error))
    return Played(point, answers, duration_s=float(len(firsts)), client_busy=0.1, most_in_flight=1)


# ---- what is counted


def test_a_row_holds_what_its_definitions_say() -> None:
    played = made(Point(1, None, 9, 9), [0.1, 0.2, 0.3, 0.4], gap=0.01, tokens=5, error="HTTP 503: full")
    found = result.row(played, result.SLO(first_token=0.25))
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (4, 1, 20)
    assert found["median_ttft_ms"] == pytest.approx(250)
    assert found["p99_ttft_ms"] == pytest.approx(np.percentile([100, 200, 300, 400], 99))
    assert found["median_tpot_ms"] == pytest.approx(10)
    assert found["median_e2el_ms"] == pytest.approx(290)
    assert found["good_share"] == pytest.approx(2 / 5), "the one that failed has missed the SLO too"
    assert found["request_goodput"] == pytest.approx(2 / 4)
    assert not result.kept(found, result.SLO(first_token=0.25, share=0.41))
    assert result.kept(found, result.SLO(first_token=0.25, share=0.39))


def test_the_role_is_no_first_token_and_usage_counts(stub: Stub) -> None:
    async def ask() -> LoadAnswer:
        client = clients.connect(LoadTarget(stub.url, "chat", "m"))
        try:
            return await client.send(LoadPrompt("a b c", 4))
        finally:
            await client.close()

    answer = asyncio.run(ask())
    assert (answer.error, len(answer.arrivals), answer.prompt, answer.output) == ("", 4, 11, 4)


async def ask_once(stub: Stub) -> LoadAnswer:
    """One prompt in a chat."""
    client = clients.connect(LoadTarget(stub.url, "chat", "m"))
    try:
        return await client.send(LoadPrompt("a", 4))
    finally:
        await client.close()


def test_a_stream_that_is_cut_is_a_failure(stub: Stub) -> None:
    """A proxy may end a stream as if it were whole: neither usage nor [DONE] has come."""
    stub.cut = True
    assert "cut" in asyncio.run(ask_once(stub)).error


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([b'data: {"error": {"message": "the engine died"}}\n\n'], "the engine died"),
        ([b"data: {broken\n\n"], "JSON"),
        ([b": nothing\n\n"], "without a token"),
        ([b'data: []\n\ndata: {"choices": 3}\n\n'], "none of the protocol chat"),
        ([b"data: 3\n\n"], "none of the protocol chat"),
    ],
)
def test_a_stream_that_goes_wrong_is_a_failure(stub: Stub, events: list[bytes], words: str) -> None:
    stub.events = events
    assert words in asyncio.run(ask_once(stub)).error


def test_a_closed_loop_keeps_so_many_in_flight_and_an_open_one_its_rate() -> None:
    class Slow:
        """Answers after 50 ms."""

        async def model(self) -> str:
            return "m"

        async def send(self, prompt: LoadPrompt) -> LoadAnswer:
            began = time.perf_counter()
            await asyncio.sleep(0.05)
            return LoadAnswer(began, time.perf_counter(), [began], 1, 1)

        async def close(self) -> None:
            pass

    prompts = PromptShape(5, 1, 0.0, 0.0, WordCount(), 1)
    closed = asyncio.run(load.play(Slow(), prompts, Point(3, None, 12, 60)))
    assert (closed.most_in_flight, len(closed.answers)) == (3, 12)
    bounded = asyncio.run(load.play(Slow(), prompts, Point(2, None, 10_000, 0.3)))
    assert len(bounded.answers) < 20, "the time ends it"
    opened = asyncio.run(load.play(Slow(), prompts, Point(None, 100.0, 50, 60)))
    assert len(opened.answers) == 50
    assert opened.duration_s > 0.45


def test_arrivals_have_the_rate_and_are_the_same_again() -> None:
    times = load.arrivals(10.0, 500, 3)
    assert times == load.arrivals(10.0, 500, 3)
    assert times[-1] == pytest.approx(50.0)
    assert np.std(np.diff(times)) == pytest.approx(0.1, rel=0.2), "as wide as exponential ones"


# ---- prompts


def test_prompts_have_their_length_and_share_only_what_was_asked() -> None:
    shape, again = (
        PromptShape(200, 8, 0.0, 0.5, WordCount(fixed=10, per_word=2.0, measured=True), 1) for _ in range(2)
    )
    first, second = shape[0].text.split(), shape[1].text.split()
    assert len(first) == len(second) == 95
    same = next(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    assert 47 <= same <= 52
    assert shape[0] == shape[0] == again[0]


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "max_tokens": 3}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    prompts = FromFile(file, 9)
    assert [prompts[i].text for i in range(3)] == ["a", "b", "a"]
    assert [prompts[i].output for i in range(2)] == [3, 9]
    for line in ("[]", "{}", '{"prompt": "a", "max_tokens": 0}', "{"):
        file.write_text(line + "\n")
        with pytest.raises(ConfigError, match="--prompts"):
            FromFile(file, 9)


# ---- the command


def test_the_command_saves_what_plan_and_simulate_read(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENCH_KEY", KEY)
    file = tmp_path / "bench.json"
    words = ["--save", str(file), "--prompt", "105", "--api-key-env", "BENCH_KEY", "--extra", '{"top_k": 1}']
    assert bench(stub, *words, "--repeat", "2") == 0
    text = capsys.readouterr().out
    assert "2 at once" in text
    assert stub.keys == {f"Bearer {KEY}"}
    assert KEY not in text + file.read_text()
    content = json.loads(file.read_text())
    assert content["schema"] == result.SCHEMA
    assert [row["completed"] for row in content["results"]] == [6, 6]
    row = content["results"][0]
    assert row["total_input_tokens"] == pytest.approx(6 * 105, rel=0.02), "the prompts' length was measured"
    assert row["total_output_tokens"] == 24
    assert stub.bodies[-1]["ignore_eos"] is True
    assert stub.bodies[-1]["top_k"] == 1
    assert len(measured.read_benchmark(file, timed=False)) == 2


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--first-token", "60"], 0),
        (["--end-to-end", "0.000001"], 1),
        (["--header", "Authorization:x"], 2),
        (["--protocol", "grpc"], 2),
        (["--protocol", "chat-whole", "--gap", "1"], 2),
        (["--concurrency", "0"], 2),
        (["--rate", "1"], 2),
        (["--api-key-env", "NOT_SET_ANYWHERE"], 2),
        (["--extra", "[]"], 2),
    ],
)
def test_exit_codes(stub: Stub, words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(stub, *words) == code


def test_refusals_are_counted_and_told(stub: Stub, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n')
    stub.status = 429
    assert bench(stub, "--prompts", str(file)) == 3
    assert "429: no room" in capsys.readouterr().err
    assert cli.main(["bench", "http://127.0.0.1:9", "-q"]) == 3
    assert cli.main(["bench", "http://user:pass@127.0.0.1:9"]) == 2


# ---- two results


def rows_of(scale: float, noise: float, seed: int, number: int = 400) -> list[result.Row]:
    """A run whose first tokens lie around 100 ms times `scale`."""
    dice = np.random.default_rng(seed)
    firsts = list(0.1 * scale * dice.lognormal(0.0, noise, number))
    return [result.row(made(Point(4, None, number, 60), firsts, 0.01 * scale, 8), result.SLO())]


def test_a_difference_is_told_from_noise() -> None:
    verdicts = {d.figure: d.verdict for d in compare.compare(rows_of(1.0, 0.3, 1), rows_of(1.3, 0.3, 2))}
    assert verdicts["first token p50"] == "worse"
    assert verdicts["gap p50"] == "worse"
    verdicts = {d.figure: d.verdict for d in compare.compare(rows_of(1.3, 0.3, 1), rows_of(1.0, 0.3, 2))}
    assert verdicts["first token p50"] == "better"


def test_the_same_is_hardly_ever_called_different() -> None:
    """Of 20 pairs without a difference at most 2 are called one (less than one is expected: 5 %, less what the
    tolerance takes)."""
    wrong = 0
    for seed in range(20):
        found = compare.compare(rows_of(1.0, 0.3, seed, 100), rows_of(1.0, 0.3, 1000 + seed, 100), seed=seed)
        wrong += next(d.verdict for d in found if d.figure == "first token p50") in ("better", "worse")
    assert wrong <= 2


def test_compare_speaks_to_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    for path, scale in ((old, 1.0), (new, 2.0)):
        path.write_text(json.dumps(result.result("http://x", "m", "chat", {}, result.SLO(), rows_of(scale, 0.2, 1))))
    assert cli.main(["bench", "compare", str(old), str(new), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["worse"] is True
    assert cli.main(["bench", "compare", str(old), str(old)]) == 0
    assert "NEW / OLD" in capsys.readouterr().out
    assert cli.main(["bench", "compare", str(old), str(tmp_path / "none.json")]) == 2
    other = rows_of(1.0, 0.2, 1)
    other[0]["max_concurrency"] = 8
    new.write_text(json.dumps(other))
    assert cli.main(["bench", "compare", str(old), str(new)]) == 2
    assert "no load is in both" in capsys.readouterr().err


def test_a_result_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "bench.png"
    whole = result.row(Played(Point(8, None, 1, 1), [LoadAnswer(0.0, 0.5, [], 3, 4)], 1.0), result.SLO())
    draw_bench(file, [*rows_of(1.0, 0.2, 1, 30), whole], result.SLO(first_token=0.1))
    assert file.read_bytes().startswith(b"\x89PNG")


# ---- what simulate makes of it


def test_steps_are_fitted_to_a_benchmark(tmp_path: Path) -> None:
    """Loads made from known steps give those steps back, and a scenario takes the file."""
    fixed, sequence, token = 0.008, 0.0011, 0.0001
    rows = []
    for running in (1, 4, 16):
        gap = fixed + sequence * running + running / 64 * 200 * token
        tokens = 64 * 100
        rows.append(
            {
                "max_concurrency": running,
                "completed": 100,
                "total_input_tokens": 20_000,
                "total_output_tokens": tokens,
                "duration": tokens * gap / running,
                "median_tpot_ms": 1000 * gap,
                "median_ttft_ms": 1000 * (fixed + sequence + 200 * token),
            }
        )
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"results": rows}))
    step = measured.fitted_steps(file)
    assert step.step(4, 100) == pytest.approx(fixed + 4 * sequence, rel=0.02)
    assert step.prefill(200) == pytest.approx(fixed + 200 * token, rel=0.05)
    scenario = simulate.scenario_of(
        {"model": {"steps": "bench.json"}, "arrivals": {"rate": 1, "duration": 30}, "scaler": {"class": "fixed"}},
        "s",
        tmp_path,
    )
    assert "fitted to 3 loads" in scenario.step.source
    file.write_text(json.dumps(rows[:1]))
    with pytest.raises(ConfigError, match="two loads"):
        measured.fitted_steps(file)


def test_a_file_that_can_not_be_written_is_named_before_the_load(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        result.writable(tmp_path / "nowhere" / "bench.json")
    with pytest.raises(ConfigError, match="a folder"):
        result.writable(tmp_path)
    result.writable(tmp_path / "bench.json")
    assert not list(tmp_path.iterdir())


def test_a_second_interrupt_ends_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(_arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "main", twice)
    assert cli.main(["simulate"]) == 130


def test_what_was_measured_before_an_interrupt_is_shown(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = command.play

    async def once(client: clients.LoadClient, prompts: Any, point: Point, *rest: Any) -> Played:
        if point.concurrency == 2:
            raise KeyboardInterrupt
        return await real(client, prompts, point, *rest)

    monkeypatch.setattr(command, "play", once)
    assert bench(stub, "--concurrency", "1,2", "--requests", "3", "--json") == 130
    shown = capsys.readouterr()
    assert [row["max_concurrency"] for row in json.loads(shown.out)["results"]] == [1]
    assert "stopped; complete: 1 at once" in shown.err
