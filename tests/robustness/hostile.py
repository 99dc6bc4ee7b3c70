"""Eight hostile clients beside 32 honest streams: what the honest ones feel of it. Loopback only, bounded in time.

    python -m tests.robustness.hostile [--seconds 20] [--http2]

Starts the demo model with keys. 32 clients stream one answer after another, first alone, then beside eight clients
each of which does one thing over and over, and then alone again; with `--http2`, beside one for each flood of frames in
`hostile_http2`, to both ports, with and without a key. Printed: the 99th percentile of the time between two
tokens, the failures, and the server's memory, of each part; and what the hostile clients were answered. Ends with 1
where an honest request failed, the percentile beside them is over twice that of alone, or memory has grown by more
than a tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
from h2.config import H2Configuration
from h2.connection import H2Connection

from tests.robustness.hostile_http2 import flood, floods
from tests.robustness.test_requests import heavy
from tests.support import DEMO, Server

STREAMS = 32
HONEST, HOSTILE = "kv-honest", "kv-hostile"
TOKENS = 200
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
WITH_KEY = HEAD + f"Authorization: Bearer {HOSTILE}\r\n".encode()
CHAT = json.dumps(
    {
        "model": "demo",
        "messages": [{"role": "user", "content": "1, 2, 3"}],
        "max_tokens": 500,
        "ignore_eos": True,
        "stream": True,
    }
).encode()
_INFER = "/inference.GRPCInferenceService/ModelInfer"
PAUSE_S = 0.02  # between two attacks of a client, so that the clients do not take the processors themselves


class Honest:
    """The honest streams, until told to stop.

    Attributes:
        gaps_s: seconds between two chunks of a stream.
        failures: what went wrong, a line each.
        whole: answers that came whole.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.gaps_s: list[float] = []
        self.failures: list[str] = []
        self.whole = 0

    async def run(self, seconds: float) -> None:
        """Stream on all connections for so long, then let the last answers end."""
        limits = httpx.Limits(max_connections=STREAMS)
        end = time.perf_counter() + seconds
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._client(client, end) for _ in range(STREAMS)))

    async def _client(self, client: httpx.AsyncClient, end: float) -> None:
        body = {"model": "demo", "prompt": "17 + 25 =", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        while time.perf_counter() < end:
            tokens, last, done = 0, 0.0, False
            try:
                headers = {"authorization": f"Bearer {HONEST}"}
                async with client.stream("POST", self.url + "/v1/completions", json=body, headers=headers) as answer:
                    if answer.status_code != 200:
                        self.failures.append(f"status {answer.status_code}: {(await answer.aread())[:200]!r}")
                        continue
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {"):
                            now = time.perf_counter()
                            if last:
                                self.gaps_s.append(now - last)
                            last, tokens = now, tokens + 1
                        done = done or line == "data: [DONE]"
            except httpx.HTTPError as error:
                self.failures.append(repr(error))
                continue
            if done:
                self.whole += 1
            else:
                self.failures.append(f"ended after {tokens} chunks")

    @property
    def p99_ms(self) -> float:
        """The 99th percentile of the gaps, in ms."""
        return statistics.quantiles(self.gaps_s, n=100)[98] * 1e3


def connect(port: int) -> socket.socket:
    """A connection on which nothing takes longer than 5 s."""
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def answered(sock: socket.socket) -> str:
    """The first status of what comes back."""
    return sock.recv(4096)[9:12].decode("latin-1") or "closed"


def heads_that_never_end(server: Server) -> str:
    """Opens connections and sends half of a head on each."""
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(sock := connect(server.http_port)).sendall(b"GET /v1/models HTTP/1.1\r\nX-Slow: ")
            sock.sendall(b"a")
        time.sleep(0.2)
    return "left"


def heads_of_any_size(server: Server) -> str:
    """Sends header lines for as long as they are taken."""
    with connect(server.http_port) as sock:
        sock.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n")
        for number in range(200_000):
            sock.sendall(b"x-%d: %s\r\n" % (number, b"a" * 1000))
    return "taken"


def heads_without_bodies(server: Server) -> str:
    """Sends what takes a place in the queue, but for the body, with a key."""
    with contextlib.ExitStack() as stack:
        for _ in range(70):
            sock = stack.enter_context(connect(server.http_port))
            sock.sendall(WITH_KEY + b"Content-Length: 100\r\n\r\n")
        time.sleep(0.2)
    return "left"


def bodies_without_a_key(server: Server) -> str:
    """Sends 4 MiB to who has to refuse it."""
    with connect(server.http_port) as sock:
        sock.sendall(HEAD + b"Content-Length: 4194304\r\n\r\n")
        sock.sendall(bytes(4 << 20))
        return answered(sock)


HEAVY: Iterator[tuple[str, str, bytes, dict[str, str]]] = itertools.cycle(heavy())


def bodies_that_are_hard_to_read(server: Server) -> str:
    """Sends what is as large, as deep and as many as it may be, with a key."""
    _, path, body, headers = next(HEAVY)
    headers = {**headers, "content-type": "application/json", "authorization": f"Bearer {HOSTILE}"}
    return str(httpx.post(server.url + path, content=body, headers=headers, timeout=30).status_code)


def streams_that_nobody_reads(server: Server) -> str:
    """Asks for a stream through a small window, reads nothing of it and leaves."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(5)
        sock.connect(("127.0.0.1", server.http_port))
        sock.sendall(WITH_KEY + b"Content-Length: %d\r\n\r\n" % len(CHAT) + CHAT)
        time.sleep(0.3)
    return "left"


def streams_that_are_reset(server: Server) -> str:
    """Asks for a stream and resets the connection at its first byte."""
    with connect(server.http_port) as sock:
        sock.sendall(WITH_KEY + b"Content-Length: %d\r\n\r\n" % len(CHAT) + CHAT)
        status = answered(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    return status


def messages_over_grpc_without_a_key(server: Server) -> str:
    """Begins a hundred calls on one connection, sends 64 KiB of each and leaves."""
    h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
    h2.initiate_connection()
    with connect(server.grpc_port) as sock:
        for _ in range(100):
            stream = h2.get_next_available_stream_id()
            pseudo = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", _INFER)]
            h2.send_headers(stream, [*pseudo, ("te", "trailers"), ("content-type", "application/grpc")])
            with contextlib.suppress(Exception):  # the window is empty before long, which the client may not pass
                h2.send_data(stream, b"\0\x03\0\0\0" + bytes(16_000))
            sock.sendall(h2.data_to_send())
        sock.recv(1 << 16)
    return "refused"


ATTACKS: list[Callable[[Server], str]] = [
    heads_that_never_end,
    heads_of_any_size,
    heads_without_bodies,
    bodies_without_a_key,
    bodies_that_are_hard_to_read,
    streams_that_nobody_reads,
    streams_that_are_reset,
    messages_over_grpc_without_a_key,
]


def over_http2(server: Server) -> dict[str, Callable[[Server], str]]:
    """The floods of HTTP/2, by name: to the HTTP port without a key and with one, then to gRPC's."""
    found: dict[str, Callable[[Server], str]] = {}
    for port, grpc in ((server.http_port, False), (server.grpc_port, True)):
        for key in (None, HOSTILE):
            for name in floods(key, grpc):

                def send(
                    _: Server, port: int = port, key: str | None = key, grpc: bool = grpc, name: str = name
                ) -> str:
                    return flood(port, floods(key, grpc)[name])

                found[f"{name}{' over gRPC' if grpc else ''}{'' if key else ' without a key'}"] = send
    return found


def attack(server: Server, seconds: float, http2: bool) -> dict[str, Counter[str]]:
    """Run the clients for so long; what each was answered."""
    os.nice(10)  # they are to cost the server its time, not the honest clients on this machine theirs
    attacks = over_http2(server) if http2 else {each.__name__: each for each in ATTACKS}
    found: dict[str, Counter[str]] = {name: Counter() for name in attacks}
    end = time.monotonic() + seconds

    def run(name: str) -> None:
        while time.monotonic() < end:
            try:
                found[name][attacks[name](server)] += 1
            except (OSError, httpx.HTTPError) as error:
                found[name][type(error).__name__] += 1
            time.sleep(PAUSE_S)

    threads = [threading.Thread(target=run, args=(name,)) for name in attacks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def keys(folder: Path) -> Path:
    """A file of two keys; the hostile one has the limits that a tenant nobody trusts is given."""
    rows = [
        {"id": tenant, "tenant": tenant, "sha256": hashlib.sha256(key.encode()).hexdigest()}
        for tenant, key in (("honest", HONEST), ("hostile", HOSTILE))
    ]
    tenants = {"honest": {}, "hostile": {"limits": {"requests_per_minute": 600, "concurrent": 4}}}
    path = folder / "keys.json"
    path.write_text(json.dumps({"tenants": tenants, "keys": rows}))
    return path


def memory_mib(server: Server) -> float:
    """What the front end holds, in MiB."""
    return float(psutil.Process(server.process.pid).memory_info().rss / (1 << 20))


def main() -> int:
    """Run the three parts, print what was seen, and say by the exit code whether it is as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="of each part; 20 unless given")
    parser.add_argument("--http2", action="store_true", help="the floods of HTTP/2 instead of the eight")
    parser.add_argument("--attack", nargs=2, type=int, metavar=("HTTP", "GRPC"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        target = Server.__new__(Server)
        target.http_port, target.grpc_port = options.attack
        target.url = f"http://127.0.0.1:{target.http_port}"
        print(json.dumps(attack(target, options.seconds, options.http2)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        server = Server(
            [*DEMO, "--max-model-len", "1024", "--max-body-mib", "4", "--keys-file", str(keys(Path(folder)))],
            fresh=True,
        ).wait_ready()
        try:
            return compare(server, options.seconds, options.http2)
        finally:
            server.stop()


def compare(server: Server, seconds: float, http2: bool) -> int:
    """The three parts; the exit code."""
    asyncio.run(Honest(server.url).run(5))  # buffers and caches as they are under load
    attack_once = [sys.executable, "-m", "tests.robustness.hostile", "--seconds"]
    ports = ["--attack", str(server.http_port), str(server.grpc_port), *(["--http2"] if http2 else [])]
    subprocess.run([*attack_once, "5", *ports], check=True, capture_output=True)
    time.sleep(2)
    parts: dict[str, tuple[Honest, float]] = {}
    answers = ""
    for part in ("alone", "beside them", "alone again"):
        honest = Honest(server.url)
        if part == "beside them":
            with subprocess.Popen([*attack_once, str(seconds + 2), *ports], stdout=subprocess.PIPE, text=True) as eight:
                time.sleep(2)
                asyncio.run(honest.run(seconds))
                answers, _ = eight.communicate()
        else:
            asyncio.run(honest.run(seconds))
        time.sleep(1)
        parts[part] = honest, memory_mib(server)
        print(
            f"{part:12} p99 gap {honest.p99_ms:7.1f} ms, {honest.whole} answers, {len(honest.failures)} failed, "
            f"{parts[part][1]:.0f} MiB",
            flush=True,
        )
        for line in sorted(set(honest.failures))[:5]:
            print(f"             {line}")
    for name, counts in json.loads(answers).items():
        print(f"  {name}: {', '.join(f'{what} {count}' for what, count in sorted(counts.items()))}")
    held = server.metric("kserve_vllm_event_loop_holds_total")
    alone = statistics.mean(parts[part][0].p99_ms for part in ("alone", "alone again"))
    ratio = parts["beside them"][0].p99_ms / alone
    growth = parts["alone again"][1] / parts["alone"][1] - 1
    print(f"p99 gap beside them over alone: {ratio:.2f}; memory {growth:+.1%}; loop held over 200 ms: {held:.0f}")
    failed = sum(len(honest.failures) for honest, _ in parts.values())
    return int(bool(failed) or ratio > 2 or growth > 0.1)


if __name__ == "__main__":
    sys.exit(main())
