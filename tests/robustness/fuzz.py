"""Made-up input against everything that reads what strangers send, or what operators write.

    python -m tests.robustness.fuzz --minutes 10 [--target NAME] [--seed 0]

Whatever comes, a parser says what is wrong in its own words (`RequestError`, `ConfigError`), a connection ends or goes
on, and nothing stays behind. Seeds are numbers that count up, so that a failure can be had again with `--seed`; what
was found becomes a test.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from kserve_vllm.core.errors import ConfigError, RequestError
from kserve_vllm.grpc_server import self_test
from kserve_vllm.grpc_server.calls import Services
from kserve_vllm.policy import tenants
from kserve_vllm.policy.moderation.hooks import Moderation
from kserve_vllm.protocols import moderation as moderated
from kserve_vllm.protocols.oip import generate, tensors
from kserve_vllm.protocols.oip.grpc_servicer import Messages, decoder
from kserve_vllm.protocols.oip.text import V2Text

MESSAGES = Messages()


@dataclass(frozen=True)
class Target:
    """Something that reads.

    Attributes:
        name: for the command line.
        inputs: what it is given.
        check: gives it; raises where it did what it should not.
    """

    name: str
    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]

    def run(self, number: int, examples: int) -> None:
        """Try so many inputs of a seed.

        Raises:
            Exception: what `check` raised, with the smallest input that was found for it.
        """

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        @given(self.inputs)
        def attempt(given_input: Any) -> None:
            self.check(given_input)

        attempt()


# What is put together

_JUNK: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=8).map(repr),
    st.sampled_from(["9" * 5000, "\ud800", "a" * 5000, "1e999999", -1, 2**63, 2**64, 10**400, [[[]]], {"": {}}]),
)


def _trees(names: Sequence[str], leaves: Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    """Trees of known names and values, and of others."""
    keys = st.one_of(st.sampled_from(list(names)), st.text(max_size=5))
    values = st.one_of(_JUNK, st.sampled_from([*names, *leaves]))
    return st.recursive(
        values,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=6)),
        max_leaves=25,
    )


class _Engine:
    """A model that generates; nothing is asked of it."""

    generates, embeds, classifies, prioritizes = True, False, False, False


_TEXT = V2Text(_Engine(), 512)  # type: ignore[arg-type]
_INPUT_NAMES = ["text_input", "input_ids", "input_lengths", "sampling_parameters", "stream", "return_logprobs"]
_V2_NAMES = [
    "id",
    "inputs",
    "outputs",
    "parameters",
    "name",
    "shape",
    "datatype",
    "data",
    "binary_data_size",
    "text_input",
    *_INPUT_NAMES,
]
_OPTIONS = ["stop", "logit_bias", "stop_token_ids", "structured_outputs", "stream", "apply_chat_template", "n", "seed"]


def _tensor(draw: st.DrawFn) -> dict[str, Any]:
    item: dict[str, Any] = {
        "name": draw(st.sampled_from(_INPUT_NAMES)),
        "datatype": draw(st.sampled_from([*tensors.DTYPES, "bytes", "STRING"])),
        "shape": draw(st.one_of(st.lists(st.integers(0, 3), max_size=3), st.lists(st.integers(), max_size=9), _JUNK)),
    }
    data = st.one_of(st.lists(_JUNK, max_size=4), st.lists(st.integers(0, 300), max_size=9), _trees(["a"]))
    if draw(st.booleans()):
        item["data"] = draw(data)
    if draw(st.booleans()):
        item["parameters"] = draw(st.one_of(st.fixed_dictionaries({"binary_data_size": st.integers(0, 40)}), _JUNK))
    return item


@st.composite
def _rest(draw: st.DrawFn) -> tuple[bytes, str | None]:
    """A body of V2 over REST, and the length of its JSON."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=60)), draw(st.one_of(st.none(), st.text(max_size=6), st.just("9" * 5000)))
    tree: Any = draw(_trees(_V2_NAMES))
    if draw(st.booleans()):
        tree = {
            "inputs": [_tensor(draw) for _ in range(draw(st.integers(0, 3)))],
            "parameters": draw(st.dictionaries(st.sampled_from(_OPTIONS), _JUNK, max_size=4)),
        }
    if draw(st.integers(0, 3)) == 0:
        # Nearly right, so that what comes after the tensors is read too.
        good = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["x"]}
        words = st.sampled_from(["9" * 5000, '{"seed": ' + "9" * 5000 + "}", "[" * 5000, "{}", '"\\ud800"', "{", ""])
        options = {**good, "name": "sampling_parameters", "data": [draw(st.one_of(words, st.text(max_size=9)))]}
        tree = {
            "inputs": [good, options] if draw(st.booleans()) else [good],
            "parameters": draw(st.dictionaries(st.sampled_from(_OPTIONS), st.one_of(_JUNK, words), max_size=3)),
        }
    head = json.dumps(tree).encode()
    tail = draw(st.one_of(st.just(b""), st.binary(max_size=60)))
    length = draw(st.sampled_from([None, str(len(head)), str(len(head) + 1), "-1", "0", "9" * 5000]))
    return head + tail, length


def _check_rest(sent: tuple[bytes, str | None]) -> None:
    with contextlib.suppress(RequestError):
        _use(tensors.parse_rest(sent[0], sent[1], "m", None))
    with contextlib.suppress(RequestError):
        tree = tensors.parse_json_object(sent[0])
        _use(generate.to_request(tree, "m", None, True)[0])


def _use(request: Any) -> None:
    """What is done with a request, up to the engine."""
    for tensor in request.inputs:
        with contextlib.suppress(RequestError):
            tensors.decode(tensor)
    _TEXT.parse(request)


@st.composite
def _message(draw: st.DrawFn) -> bytes:
    """A serialized `ModelInferRequest`, at times with a part replaced."""
    message = MESSAGES.ModelInferRequest(model_name=draw(st.text(st.characters(codec="utf-8"), max_size=4)))
    for _ in range(draw(st.integers(0, 3))):
        tensor = message.inputs.add(
            name=draw(st.sampled_from(_INPUT_NAMES)),
            datatype=draw(st.sampled_from([*tensors.DTYPES, "X"])),
            shape=draw(st.lists(st.one_of(st.integers(0, 3), st.integers(-(2**63), 2**63 - 1)), max_size=9)),
        )
        if draw(st.booleans()):
            field = draw(st.sampled_from(sorted(set(tensors.CONTENTS_FIELD.values()))))
            kind = st.binary(max_size=6) if field == "bytes_contents" else st.integers(0, 1)
            getattr(tensor.contents, field).extend(draw(st.lists(kind, max_size=5)))
    for name in draw(st.lists(st.sampled_from(_OPTIONS), max_size=3, unique=True)):
        parameter = message.parameters[name]
        value = draw(
            st.one_of(
                st.booleans(),
                st.integers(-(2**63), 2**63 - 1),
                st.floats(),
                st.sampled_from(["[" * 3000, "[" + "9" * 5000 + "]", '{"a": "\\ud800"}', "x"]),
            )
        )
        field = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(parameter, field, value)
    message.raw_input_contents.extend(draw(st.lists(st.binary(max_size=20), max_size=3)))
    data = message.SerializeToString()
    if draw(st.booleans()) and data:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=8)) + data[at + draw(st.integers(0, 8)) :]
    return data


def _check_message(data: bytes) -> None:
    request = decoder(MESSAGES.ModelInferRequest)(data)
    if isinstance(request, Exception):
        return
    with contextlib.suppress(RequestError):
        _use(tensors.from_grpc(request))


# Frames and metadata

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5)
_HEADER_NAMES = [
    b":method",
    b":path",
    b":scheme",
    b":authority",
    b"te",
    b"content-type",
    b"grpc-timeout",
    b"grpc-encoding",
    b"x-request-id",
    b"my-bin",
    b"authorization",
    b"content-length",
    b"x",
]
_HEADER_VALUES = [
    b"POST",
    b"GET",
    b"/self.Test/echo",
    b"/self.Test/stream",
    b"/self.Test/wait",
    b"/",
    b"http",
    b"trailers",
    b"application/grpc",
    b"gzip",
    b"identity",
    b"1S",
    b"99999999H",
    b"0n",
    b"???",
    b"AAEC",
    b"9" * 5000,
]
_GOOD = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/self.Test/echo"),
    (b":authority", b"x"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
]


def _block(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    out = bytearray()
    for pair in headers:
        out.append(0)
        for text in pair:
            size = len(text)
            if size < 127:
                out.append(size)
            else:
                out.append(127)
                size -= 127
                while size > 127:
                    out.append(size & 127 | 128)
                    size >>= 7
                out.append(size)
            out += text
    return bytes(out)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


@st.composite
def _headers(draw: st.DrawFn) -> bytes:
    values = st.one_of(st.sampled_from(_HEADER_VALUES), st.binary(max_size=12))
    names = st.one_of(st.sampled_from(_HEADER_NAMES), st.binary(max_size=6))
    more = draw(st.lists(st.tuples(names, values), max_size=4))
    head = [pair for pair in _GOOD if draw(st.integers(0, 12))]
    return _block(head + more if draw(st.integers(0, 3)) else more + head)


@st.composite
def _frames(draw: st.DrawFn) -> list[bytes]:
    """What a client sends, in the pieces in which it comes."""
    parts = [_PREFACE] if draw(st.integers(0, 9)) else []
    for _ in range(draw(st.integers(1, 8))):
        stream = draw(st.sampled_from([0, 1, 1, 1, 3, 3, 5, 2, 2**31 - 1]))
        flags = draw(st.sampled_from([0, 1, 4, 4, 5, 5, 8, 32, 255]))
        kind = draw(st.sampled_from([0, 0, 0, 1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 22]))
        if kind in (1, 9):
            payload = draw(st.one_of(_headers(), _headers(), st.binary(max_size=30)))
        elif kind == 0:
            message = draw(st.binary(max_size=20))
            whole = bytes([draw(st.sampled_from([0, 0, 1, 7]))]) + len(message).to_bytes(4, "big") + message
            payload = whole[: draw(st.integers(0, len(whole)))] if draw(st.booleans()) else whole
        else:
            payload = draw(
                st.one_of(
                    st.binary(min_size=4, max_size=4), st.sampled_from([bytes(8), bytes(5)]), st.binary(max_size=18)
                )
            )
        parts.append(_frame(kind, flags, stream, payload))
    data = b"".join(parts)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


class _Loud(logging.Handler):
    """Raises what the server only logs: that it did not foresee something."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "its connection is closed" not in record.getMessage():
            self.found.append(self.format(record))


def _check_frames(pieces: list[bytes]) -> None:
    asyncio.run(_send(pieces))


async def _send(pieces: list[bytes]) -> None:
    loud = _Loud()
    log = logging.getLogger("kserve_vllm.grpc_server")
    log.addHandler(loud)
    unforeseen: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unforeseen.append(context))
    services = Services(1 << 16)
    services.add_generic_rpc_handlers((self_test.echo_handlers(),))
    connection = services.connect()
    wire = self_test.MemoryTransport()
    connection.connection_made(wire)
    try:
        for piece in pieces:
            connection.data_received(piece)
            for _ in range(3):
                await asyncio.sleep(0)
    finally:
        connection.connection_lost(None)
        for _ in range(6):
            await asyncio.sleep(0)
        log.removeHandler(loud)
    # A stranger's number for the handler `stream` is no fault of the server.
    found = [line for line in loud.found if "invalid literal for int" not in line]
    assert not found, found
    assert not unforeseen, unforeseen
    assert not services.open_calls
    assert services.budget.held == services.keyless_budget.held == 0
    assert not services.connections


# Files

_KEY_NAMES = [
    "keys",
    "tenants",
    "tiers",
    "id",
    "tenant",
    "sha256",
    "admin",
    "expires",
    "limits",
    "models",
    "tier",
    "priority",
    "may_choose_priority",
    "requests_per_minute",
    "tokens_per_minute",
    "concurrent",
]
_KEY_LEAVES = [
    "a" * 64,
    "2030-01-01T00:00:00Z",
    "high",
    "demo*",
    5,
    True,
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59-14:00",
]
_HOOK_NAMES = [
    "hooks",
    "name",
    "patterns",
    "regex",
    "literal",
    "replacement",
    "action",
    "on",
    "tenants",
    "holdback_chars",
    "timeout_s",
    "on_error",
    "endpoint",
    "url",
    "window_chars",
    "ignore_case",
]
_HOOK_LEAVES = ["redact", "refuse", "prompt", "answer", "(a+)+$", "[", "\\b\\d{16}\\b", "(?i)x", "https://x/y", 64, 0.1]


def _files(names: Sequence[str], leaves: Sequence[Any]) -> st.SearchStrategy[str]:
    def write(tree: Any) -> str:
        return yaml.safe_dump(tree, allow_unicode=False)

    whole = _trees(names, leaves).map(write)
    listed = st.fixed_dictionaries(
        {
            names[0]: st.lists(
                st.dictionaries(
                    st.sampled_from(list(names)),
                    st.one_of(st.sampled_from(list(leaves)), _trees(names, leaves)),
                    max_size=6,
                ),
                max_size=3,
            )
        }
    ).map(write)
    return st.one_of(whole, listed, listed, st.text(max_size=60), _trees(names, leaves).map(lambda t: json.dumps(t)))


def _check_keys(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with contextlib.suppress(ConfigError):
            known = tenants.Tenants(str(path))
            with contextlib.suppress(RequestError):
                known.identify(text)


def _check_hooks(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hooks.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with contextlib.suppress(ConfigError):
            Moderation(path)


# Bodies under a moderation

_BODY_NAMES = [
    "messages",
    "role",
    "content",
    "type",
    "text",
    "image_url",
    "url",
    "data",
    "input",
    "prompt",
    "tools",
    "arguments",
    "function",
    "tool_calls",
    "source",
    "input_audio",
    "documents",
    "chat_template_kwargs",
]
_BODY_LEAVES = ["user", "data:image/png;base64,AAAA", "data:image/png,", '{"a": "b"}', "input_audio", "image", 10**12]


class _Shouting:
    """A hook that changes every text."""

    media = frozenset({"image"})

    def looks_at(self, where: Any, tenant: str) -> bool:
        """It looks at everything."""
        return True

    async def prompt(self, texts: list[str], tenant: str) -> list[str]:
        """The texts, with an end to each."""
        return [f"{text}!" for text in texts]


def _check_body(body: Any) -> None:
    raw = json.dumps(body).encode()
    with contextlib.suppress(RequestError):
        asyncio.run(moderated.moderate_body("/v1/chat/completions", raw, _Shouting(), "t"))


TARGETS = {
    target.name: target
    for target in (
        Target("tensors", _rest(), _check_rest),
        Target("messages", _message(), _check_message),
        Target("frames", _frames(), _check_frames),
        Target("keys", _files(_KEY_NAMES, _KEY_LEAVES), _check_keys),
        Target("hooks", _files(_HOOK_NAMES, _HOOK_LEAVES), _check_hooks),
        Target("bodies", _trees(_BODY_NAMES, _BODY_LEAVES), _check_body),
    )
}


def main() -> int:
    """Run until the time is over; 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="default: all, in turns")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--examples", type=int, default=200, help="inputs a seed")
    args = parser.parse_args()
    until, number, done = time.monotonic() + 60 * args.minutes, args.seed, 0
    while time.monotonic() < until:
        for name in args.target or TARGETS:
            try:
                TARGETS[name].run(number, args.examples)
            except Exception:
                print(f"found by --target {name} --seed {number}", file=sys.stderr)
                raise
            done += args.examples
        number += 1
    print(f"nothing found: {done} inputs, seeds {args.seed} to {number - 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
