"""Requests through a gateway, each counted: whole, or how it was lost; and who answered."""

from __future__ import annotations

import collections
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx

PROMPT = "Hello there, tell me a long story"


@dataclass
class Count:
    """What came of many requests.

    Attributes:
        whole: answers that were complete; a stream has to say `[DONE]`.
        lost: every other request: when it was sent and what happened.
        who: complete answers by `system_fingerprint`, which differs between servers of different models.
        seconds: of each complete answer.
        first_s: of each complete stream, until its first token.
        cut: how many of the lost ones were streams that had begun.
        refused: answers of a status in `expected` of the load.
    """

    whole: int = 0
    lost: list[str] = field(default_factory=list)
    who: collections.Counter[str] = field(default_factory=collections.Counter)
    seconds: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    cut: int = 0
    refused: int = 0

    @property
    def sent(self) -> int:
        """All requests."""
        return self.whole + len(self.lost) + self.refused

    def __str__(self) -> str:
        return f"{self.sent} sent, {self.whole} whole, {len(self.lost)} lost"


@dataclass(frozen=True)
class Target:
    """A service behind a gateway.

    Attributes:
        base: URL of the gateway.
        host: the host by which it knows the service.
        model: name of the model.
        headers: for every request, such as a key.
    """

    base: str
    host: str
    model: str
    headers: dict[str, str] = field(default_factory=dict)

    def client(self, timeout_s: float = 120) -> httpx.Client:
        """An HTTP client of the service."""
        return httpx.Client(
            base_url=self.base, headers={"Host": self.host, **self.headers}, timeout=timeout_s, trust_env=False
        )

    def completion(
        self,
        client: httpx.Client,
        *,
        stream: bool = False,
        tokens: int = 16,
        exactly: bool = False,
        prompt: str = PROMPT,
        on_first: Callable[[], None] | None = None,
    ) -> tuple[int, str, str]:
        """One completion: (status, fingerprint, text). Status 0 is a stream that ended early.

        Args:
            on_first: called when the first token of a stream is there.

        Raises:
            httpx.HTTPError: no answer, or one that was cut.
        """
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": stream,
            "ignore_eos": exactly,
        }
        if not stream:
            answer = client.post("/openai/v1/completions", json=body)
            if answer.status_code != 200:
                return answer.status_code, "", answer.text
            tree = answer.json()
            return 200, tree.get("system_fingerprint") or "", tree["choices"][0]["text"]
        with client.stream("POST", "/openai/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return answer.status_code, "", answer.read().decode(errors="replace")
            text, fingerprint, done, pieces = "", "", False, 0
            for line in answer.iter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    done = True
                elif data:
                    event = json.loads(data)
                    if "error" in event:
                        return 0, "", data
                    fingerprint = event.get("system_fingerprint") or fingerprint
                    if on_first is not None and not pieces:
                        on_first()
                    for choice in event["choices"]:
                        text += choice["text"]
                        pieces += 1
            return (200 if done else 0), fingerprint, text if done else f"cut after {pieces} pieces: {text[-80:]!r}"


class Load:
    """Workers that send completions until they are told to stop, or `count` were sent.

    Args:
        target: whom to ask.
        workers: how many ask at once.
        stream: every answer (True), none (False) or every second one (None) is streamed.
        tokens: of each answer, and no fewer with `exactly`.
        pause_s: of each worker between two requests.
        expected: statuses that count as refused and not as lost.
    """

    def __init__(
        self,
        target: Target,
        *,
        workers: int = 4,
        count: int | None = None,
        stream: bool | None = None,
        tokens: int = 16,
        exactly: bool = False,
        pause_s: float = 0.0,
        expected: tuple[int, ...] = (),
    ) -> None:
        self.count = Count()
        self._target, self._stream, self._tokens, self._exactly = target, stream, tokens, exactly
        self._left, self._pause_s, self._expected = count, pause_s, expected
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.workers = [threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(workers)]
        self._stopped = [threading.Event() for _ in range(workers)]

    def __enter__(self) -> Load:
        self._began = time.monotonic()
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for worker in self.workers:
            worker.join(150)

    def keep(self, workers: int) -> None:
        """Let only so many workers go on."""
        for stopped in self._stopped[workers:]:
            stopped.set()

    def run(self, within_s: float) -> Count:
        """Send `count` requests and give what came of them; ends early after `within_s` seconds."""
        with self:
            for worker in self.workers:
                worker.join(max(0.0, within_s - (time.monotonic() - self._began)))
        return self.count

    def _work(self, n: int) -> None:
        with self._target.client() as client:
            turn = n
            while not (self._stop.is_set() or self._stopped[n].is_set()):
                with self._lock:
                    if self._left is not None:
                        if self._left <= 0:
                            return
                        self._left -= 1
                turn += 1
                self._ask(client, turn % 2 == 0 if self._stream is None else self._stream)
                self._stop.wait(self._pause_s)

    def _ask(self, client: httpx.Client, stream: bool) -> None:
        began, firsts = time.monotonic(), list[float]()
        try:
            status, fingerprint, text = self._target.completion(
                client,
                stream=stream,
                tokens=self._tokens,
                exactly=self._exactly,
                on_first=lambda: firsts.append(time.monotonic() - began),
            )
        except (httpx.HTTPError, ValueError, KeyError) as error:
            status, fingerprint, text = -1, "", f"{type(error).__name__}: {error}"
        took = time.monotonic() - began
        with self._lock:
            if status == 200:
                self.count.whole += 1
                self.count.who[fingerprint] += 1
                self.count.seconds.append(took)
                self.count.first_s += firsts
            elif status in self._expected:
                self.count.refused += 1
            else:
                cut = status == 0 or (status == -1 and bool(firsts))
                what = "a cut stream" if cut else "no answer" if status == -1 else f"status {status}"
                self.count.cut += cut
                self.count.lost.append(f"+{began - self._began:.1f} s, after {took:.2f} s: {what}: {text[:200]}")


def percentile(values: list[float], share: float) -> float:
    """The smallest value that `share` of the values don't exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def within_three_sigma(seen: int, of: int, percent: int) -> bool:
    """Whether so many of so many requests are what a split by percent gives but for one time in 370."""
    share = percent / 100
    return abs(seen - of * share) <= 3 * math.sqrt(of * share * (1 - share))


def fingerprint(target: Target) -> str:
    """The fingerprint of whoever answers at a target."""
    with target.client() as client:
        status, name, text = target.completion(client, tokens=2)
        assert status == 200, text
        assert name, "the answer has no system_fingerprint"
        return name


def ask(target: Target, path: str, body: Any = None, timeout_s: float = 120) -> httpx.Response:
    """One GET, or POST where there is a body."""
    with target.client(timeout_s) as client:
        return client.get(path) if body is None else client.post(path, json=body)
