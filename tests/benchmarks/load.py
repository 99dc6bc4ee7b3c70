"""An economical load generator: raw sockets and a count of frames, no parser, so that the server is what is measured.

Run by `bench.py` and `soak.py` as a process of its own; prints one JSON object. Every request asks for an exact number
of tokens (`ignore_eos`), so tokens are counted by requests. A stream is checked by its last frame, an answer by its
status.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MODES = ("chat-stream", "completion-stream", "chat", "v2", "grpc-stream", "grpc-stream-shared", "intake", "prefix-hot")
"""`grpc-stream` has a connection for each stream, as HTTP/1.1 has to; `grpc-stream-shared` one for all, as gRPC's
clients have. `intake` and `prefix-hot` are whole chats of `SIZES`, of which the latter asks the same few prompts again
and again, in every run with the same seed."""
SIZES = {"intake": (600, 1), "prefix-hot": (640, 1)}
"""Prompt tokens and output tokens of modes that have their own: a request is a token, so that figures are of each
request. The demo model has a token for each digit and space, half as many again: 927 and 987."""
_HOT_PROMPTS = 16
_STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
# `triton_final_response` and `bool_param: true` in a map entry of the response's parameters.
_FINAL = b"triton_final_response\x12\x02\x08\x01"
_DEADLINE_S = 300.0


@dataclass
class Times:
    """What one run took, in seconds."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    pieces: int = 0

    def add(self, began: float, arrivals: list[float], tokens: int) -> None:
        """Book one request from the arrival of each of its pieces; pieces may hold several tokens."""
        self.ttft.append(arrivals[0] - began)
        self.pieces += len(arrivals)
        self.gaps += [b - a for a, b in itertools.pairwise(arrivals)]
        if tokens > 1:
            self.itl.append((arrivals[-1] - arrivals[0]) / (tokens - 1))


def prompt(rng: random.Random, words: int) -> str:
    """A prompt of its own, of about `words` tokens."""
    return " ".join(str(rng.randint(10, 99)) for _ in range(max(1, words // 2)))


def http_body(mode: str, model: str, text: str, tokens: int) -> tuple[str, dict[str, Any]]:
    """Path and JSON of a request."""
    if mode == "v2":
        tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [text]}
        return f"/v2/models/{model}/infer", {
            "inputs": [tensor],
            "parameters": {"max_tokens": tokens, "ignore_eos": True, "temperature": 0.0},
        }
    body: dict[str, Any] = {"model": model, "max_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    if mode.endswith("-stream"):
        body["stream"] = True
    if mode.startswith("chat") or mode in SIZES:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}
    return "/v1/completions", {**body, "prompt": text}


def http_request(args: argparse.Namespace, text: str) -> bytes:
    """A request as it goes over the wire."""
    path, body = http_body(args.mode, args.model, text, args.tokens)
    raw = json.dumps(body).encode()
    authorization = f"authorization: Bearer {args.key}\r\n" if args.key else ""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{authorization}"
        f"content-length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


async def http_worker(jobs: Callable[[], bytes | None], args: argparse.Namespace, to: Times) -> None:
    """Ask one request after the other over one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", args.http_port, limit=1 << 20)
    streamed = args.mode.endswith("-stream")
    while (request := jobs()) is not None:
        began = time.perf_counter()
        writer.write(request)
        headers = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in headers[:20]:
            raise RuntimeError(f"{headers!r}")
        arrivals: list[float] = []
        if streamed:
            tail = b""
            while not tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                part = await reader.read(1 << 16)
                if not part:
                    raise RuntimeError("the connection was closed in mid-stream")
                arrivals.append(time.perf_counter())
                tail = (tail + part)[-64:]
                if b'"error"' in part:
                    raise RuntimeError(f"{part!r}")
        else:
            length = next(line for line in headers.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            arrivals.append(time.perf_counter())
        to.add(began, arrivals, args.tokens)
    writer.close()


def grpc_request(args: argparse.Namespace, text: str, request_id: str) -> bytes:
    """A serialized `ModelInferRequest`."""
    from tests.triton import service_pb2

    request = service_pb2.ModelInferRequest(model_name=args.model, id=request_id)
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(text.encode())
    request.parameters["max_tokens"].int64_param = args.tokens
    request.parameters["ignore_eos"].bool_param = True
    request.parameters["stream"].bool_param = True
    # Temperature 0 as a tensor-less parameter needs a double, which older messages lack.
    request.parameters["temperature"].int64_param = 0
    raw: bytes = request.SerializeToString()
    return raw


class H2Connection:
    """gRPC calls over one connection, as raw HTTP/2 frames (RFC 9113) that are hardly looked at.

    gRPC's own client takes longer for a message than the server that is measured.

    Args:
        reader: from the server.
        writer: to the server.
    """

    _DATA, _HEADERS, _SETTINGS, _PING, _WINDOW = 0, 1, 4, 6, 8
    _ACK, _END_STREAM, _END_HEADERS = 1, 1, 4
    _HARMLESS = (_HEADERS, _SETTINGS, _PING, _WINDOW)
    _WINDOW_BYTES = 1 << 30

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._next_call = 1
        self._begun = False
        window = self._WINDOW_BYTES.to_bytes(4)
        writer.write(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + self._frame(self._SETTINGS, 0, 0, b"\x00\x04" + window)
            + self._frame(self._WINDOW, 0, 0, window)
        )

    @staticmethod
    def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload

    def open(self, path: str, headers: dict[str, str]) -> int:
        """Begin a call of `/service/method`, with further headers, each shorter than 127 bytes; its number."""
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "localhost",
            "content-type": "application/grpc",
            "te": "trailers",
            **headers,
        }
        # HPACK (RFC 7541, 6.2.2): literal fields that are not indexed, without Huffman coding.
        block = b"".join(
            b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
            for name, value in fields.items()
        )
        call, self._next_call = self._next_call, self._next_call + 2
        self._writer.write(self._frame(self._HEADERS, self._END_HEADERS, call, block))
        return call

    def send(self, call: int, message: bytes) -> None:
        """Send one message of less than 16 KiB."""
        self._writer.write(self._frame(self._DATA, 0, call, b"\x00" + len(message).to_bytes(4) + message))

    async def receive(self) -> bytes:
        """Bytes of the only call as they come, at least some, the first of them those of a frame of data.

        Raises:
            RuntimeError: the server closed the connection, or ended the call before it sent any data.
        """
        data = await self._read()
        while not self._begun:
            while data[3:4] not in (b"", bytes([self._DATA])) and len(data) >= 9 + int.from_bytes(data[:3]):
                self._check(data[3], data[4])
                data = data[9 + int.from_bytes(data[:3]) :]
            self._begun = data[3:4] == bytes([self._DATA])
            if not self._begun:
                data += await self._read()
        return data

    async def deliver(self, calls: dict[int, Callable[[bytes], None]]) -> None:
        """Hand every frame of data to whom its call belongs, until cancelled.

        Raises:
            RuntimeError: the server closed the connection or ended a call.
        """
        data = b""
        while True:
            data += await self._read()
            at, end = 0, len(data)
            while end - at >= 9 and end - at >= 9 + (size := int.from_bytes(data[at : at + 3])):
                if data[at + 3] == self._DATA:
                    calls[int.from_bytes(data[at + 5 : at + 9])](data[at + 9 : at + 9 + size])
                else:
                    self._check(data[at + 3], data[at + 4])
                at += 9 + size
            data = data[at:]

    def _check(self, kind: int, flags: int) -> None:
        if kind == self._SETTINGS and not flags & self._ACK:
            self._writer.write(self._frame(kind, self._ACK, 0, b""))
        elif kind not in self._HARMLESS or (kind == self._HEADERS and flags & self._END_STREAM):
            raise RuntimeError(f"the server ended the call: frame of type {kind}, flags {flags}")

    async def _read(self) -> bytes:
        part = await self._reader.read(1 << 16)
        if not part:
            raise RuntimeError("the connection was closed")
        return part


async def _grpc_connection(args: argparse.Namespace) -> tuple[H2Connection, dict[str, str]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", args.grpc_port, limit=1 << 20)
    return H2Connection(reader, writer), {"authorization": f"Bearer {args.key}"} if args.key else {}


async def grpc_worker(jobs: Callable[[], bytes | None], args: argparse.Namespace, to: Times) -> None:
    """Ask one request after the other over one `ModelStreamInfer` call; messages are not parsed."""
    connection, headers = await _grpc_connection(args)
    call = connection.open(_STREAM_INFER, headers)
    while (request := jobs()) is not None:
        began = time.perf_counter()
        connection.send(call, request)
        arrivals: list[float] = []
        tail = b""
        while _FINAL not in tail:
            part = await connection.receive()
            arrivals.append(time.perf_counter())
            if part[14:15] == b"\n":  # behind both prefixes: error_message, the first field
                raise RuntimeError(f"{part!r}")
            tail = tail[-64:] + part
        to.add(began, arrivals, args.tokens)


async def grpc_shared(jobs: Callable[[], bytes | None], args: argparse.Namespace, to: Times) -> None:
    """As `concurrency` workers of `grpc_worker`, all of them over one connection."""
    connection, headers = await _grpc_connection(args)
    takers: dict[int, Callable[[bytes], None]] = {}

    async def worker() -> None:
        call = connection.open(_STREAM_INFER, headers)
        while (request := jobs()) is not None:
            done = asyncio.get_running_loop().create_future()
            arrivals: list[float] = []

            def take(message: bytes, done: asyncio.Future[None] = done, arrivals: list[float] = arrivals) -> None:
                arrivals.append(time.perf_counter())
                if message[5:6] == b"\n":  # behind the prefix: error_message, the first field
                    done.set_exception(RuntimeError(f"{message!r}"))
                elif _FINAL in message:
                    done.set_result(None)

            takers[call] = take
            began = time.perf_counter()
            connection.send(call, request)
            await done
            to.add(began, arrivals, args.tokens)

    async with asyncio.TaskGroup() as group:
        delivering = group.create_task(connection.deliver(takers))
        await asyncio.gather(*(worker() for _ in range(args.concurrency)))
        delivering.cancel()


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie; 0 where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def mean(values: list[float]) -> float:
    """The mean, or 0 where there are no values."""
    return sum(values) / len(values) if values else 0.0


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Ask `requests` requests, `concurrency` at a time. Times in milliseconds."""
    rng = random.Random(args.seed)
    distinct = _HOT_PROMPTS if args.mode == "prefix-hot" else args.requests
    texts = [prompt(rng, args.prompt_tokens) for _ in range(distinct)]
    texts = [texts[number % distinct] for number in range(args.requests)]
    # Made before the clock runs: what making them takes is not the server's.
    if args.mode.startswith("grpc"):
        worker, requests = grpc_worker, [grpc_request(args, text, str(n)) for n, text in enumerate(texts)]
    else:
        worker, requests = http_worker, [http_request(args, text) for text in texts]
    workers = [worker] * args.concurrency if args.mode != "grpc-stream-shared" else [grpc_shared]

    def next_job() -> bytes | None:
        return requests.pop() if requests else None

    times = Times()
    began, cpu_s = time.perf_counter(), time.process_time()
    async with asyncio.timeout(_DEADLINE_S), asyncio.TaskGroup() as group:
        for each in workers:
            group.create_task(each(next_job, args, times))
    took, cpu_s = time.perf_counter() - began, time.process_time() - cpu_s
    return {
        "tokens": args.requests * args.tokens,
        "tokens_per_s": args.requests * args.tokens / took,
        "ttft_ms": 1e3 * mean(times.ttft),
        "ttft_p99_ms": 1e3 * percentile(times.ttft, 0.99),
        "itl_ms": 1e3 * mean(times.itl),
        "gap_p99_ms": 1e3 * percentile(times.gaps, 0.99),
        "pieces": times.pieces,
        "client": "frames counted",
        "client_cpu_us_per_token": 1e6 * cpu_s / (args.requests * args.tokens),
    }


def main() -> None:
    """Run one load and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--http-port", type=int, default=0)
    parser.add_argument("--grpc-port", type=int, default=0)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--key", default="")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        import uvloop

        result = uvloop.run(run(args))
    except ImportError:
        result = asyncio.run(run(args))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
