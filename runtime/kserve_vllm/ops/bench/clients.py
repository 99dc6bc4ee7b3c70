"""Sends one request over one of the protocols, and notes when its tokens came.

A loop of our own and not `vllm bench serve`: that takes 14 s of processor time to import for each point of a sweep,
needs the whole engine where the load comes from, and knows neither V2 nor gRPC. Its figures are defined as vLLM's are,
and its results are read by `kserve-vllm bench compare` and `kserve-vllm plan --calibrate` too.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import httpx
import orjson

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.bench.prompts import LoadPrompt

OVER_HTTP = ("chat", "chat-whole", "completions", "completions-whole", "generate-stream", "generate", "infer")
OVER_GRPC = ("grpc-stream", "grpc")
PROTOCOLS = (*OVER_HTTP, *OVER_GRPC)
STREAMED = frozenset({"chat", "completions", "generate-stream", "grpc-stream"})
_MOST_OF_AN_ERROR = 300


@dataclass(slots=True)
class LoadAnswer:
    """What came of one request. Times are seconds of `time.perf_counter`.

    Attributes:
        began: when it was sent.
        ended: when its last byte was there.
        arrivals: when each piece with text of it came; empty for an answer that comes whole.
        prompt, output, cached: tokens, as the server counts; cached is None where it does not say.
        error: why it failed, or "".
    """

    began: float = 0.0
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    prompt: int = 0
    output: int = 0
    cached: int | None = None
    error: str = ""

    @property
    def total(self) -> float:
        """Seconds to the end."""
        return self.ended - self.began

    @property
    def first_token(self) -> float | None:
        """Seconds to the first token; None where the answer came whole."""
        return self.arrivals[0] - self.began if self.arrivals else None

    @property
    def gap(self) -> float | None:
        """Mean seconds between its tokens (TPOT); None with fewer than two."""
        if not self.arrivals or self.output < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output - 1)


@dataclass(frozen=True)
class LoadTarget:
    """Where the load goes.

    Attributes:
        url: base of the server, `http(s)://` or `grpc(s)://`, without a path.
        protocol: one of `PROTOCOLS`.
        model: its name; "" until the server was asked.
        key: sent as a bearer token, or "". Never printed: see `__repr__`.
        headers: further ones, such as `Host` behind an ingress.
        timeout_s: of one request.
        temperature: of the sampling.
        full_length: whether an answer goes on to its last token whatever the model says (`ignore_eos`).
        extra: fields that are added to each body, or for V2 and gRPC to its parameters.
        ca: PEM file with the authorities to trust, or None.
    """

    url: str
    protocol: str
    model: str = ""
    key: str = field(default="", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_s: float = 120.0
    temperature: float = 0.0
    full_length: bool = True
    extra: Mapping[str, object] = field(default_factory=dict)
    ca: str | None = None


class LoadClient(Protocol):
    """One protocol to one server."""

    async def model(self) -> str:
        """The first model that the server names.

        Raises:
            Unreachable: it does not answer, or names none.
        """

    async def send(self, prompt: LoadPrompt) -> LoadAnswer:
        """Send one request; whatever goes wrong stands in the answer's `error`."""

    async def close(self) -> None:
        """Close its connections."""


class Unreachable(Exception):
    """The server can't be asked at all."""


class _InStream(Exception):
    """What a server says of an answer that it does not go on with."""


def connect(target: LoadTarget) -> LoadClient:
    """A client for the target's protocol.

    Raises:
        ConfigError: the address and the protocol do not go together, or a file can't be used.
    """
    if target.protocol in OVER_GRPC:
        return OverGRPC(target)
    return OverHTTP(target)


class OverHTTP:
    """OpenAI's API, and V2 over REST."""

    def __init__(self, target: LoadTarget) -> None:
        self._target = target
        headers = {"accept-encoding": "identity", "user-agent": "kserve-vllm-bench", **target.headers}
        if target.key:
            headers["authorization"] = f"Bearer {target.key}"
        try:
            verify = ssl.create_default_context(cafile=target.ca) if target.ca else True
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"--ca {target.ca}: {error}") from None
        self._http = httpx.AsyncClient(
            base_url=target.url,
            headers=headers,
            timeout=httpx.Timeout(target.timeout_s, connect=min(10.0, target.timeout_s)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            verify=verify,
        )
        self._path, self._streams = self._where()

    def _where(self) -> tuple[str, bool]:
        protocol = self._target.protocol
        v2 = f"/v2/models/{quote(self._target.model, safe='')}"
        path = {
            "chat": "/v1/chat/completions",
            "completions": "/v1/completions",
            "generate-stream": f"{v2}/generate_stream",
            "generate": f"{v2}/generate",
            "infer": f"{v2}/infer",
        }[protocol.removesuffix("-whole")]
        return path, protocol in STREAMED

    async def model(self) -> str:
        """The first of `/v1/models`, which the runtime has for V2's models too."""
        try:
            answer = await self._http.get("/v1/models")
            if answer.status_code == 200:
                return str(answer.json()["data"][0]["id"])
        except httpx.HTTPError as error:
            raise Unreachable(f"{self._target.url}: {_words(error)}") from None
        except (ValueError, LookupError, TypeError):
            raise Unreachable(f"{self._target.url}/v1/models names no model; say it with --model") from None
        raise Unreachable(f"{self._target.url}/v1/models: {_refusal(answer.status_code, answer.content)}")

    def body(self, prompt: LoadPrompt) -> dict[str, object]:
        """The JSON of a request."""
        own = self._target
        sampling: dict[str, object] = {"max_tokens": prompt.output, "temperature": own.temperature}
        if own.full_length:
            sampling["ignore_eos"] = True
        if own.protocol.startswith(("chat", "completions")):
            body = {"model": own.model, **sampling, "stream": self._streams}
            if self._streams:
                body["stream_options"] = {"include_usage": True}
            if own.protocol.startswith("chat"):
                body["messages"] = list(prompt.messages or [{"role": "user", "content": prompt.text}])
            else:
                body["prompt"] = prompt.text
            return body | dict(own.extra)
        if own.protocol == "infer":
            outputs = [{"name": name} for name in ("text_output", "num_input_tokens", "num_output_tokens")]
            tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [prompt.text]}
            return {"inputs": [tensor], "outputs": outputs, "parameters": {**sampling, **own.extra}}
        counted = {"exclude_input_in_output": True, "return_num_input_tokens": True, "return_num_output_tokens": True}
        return {"text_input": prompt.text, "parameters": {**sampling, **own.extra}, **counted}

    async def send(self, prompt: LoadPrompt) -> LoadAnswer:
        """Send one request."""
        answer = LoadAnswer()
        raw = orjson.dumps(self.body(prompt))
        answer.began = time.perf_counter()
        try:
            # httpx bounds each read; a stream that trickles for ever needs a bound as a whole.
            async with (
                asyncio.timeout(self._target.timeout_s),
                self._http.stream(
                    "POST", self._path, content=raw, headers={"content-type": "application/json"}
                ) as response,
            ):
                if response.status_code != 200:
                    answer.error = _refusal(response.status_code, await response.aread())
                elif self._streams:
                    ended = await self._read_stream(response.aiter_raw(), answer)
                    if self._path.startswith("/v1/") and not (ended or answer.output):
                        answer.error = "the stream was cut: it ended without [DONE]"
                else:
                    self._count(orjson.loads(await response.aread()), answer)
        except TimeoutError:
            answer.error = f"no end within {self._target.timeout_s:g} s"
        except httpx.HTTPError as error:
            answer.error = _words(error)
        except _InStream as error:
            answer.error = str(error)
        except orjson.JSONDecodeError:
            answer.error = "the answer is no JSON"
        except (ValueError, LookupError, TypeError, AttributeError):
            answer.error = f"the answer is none of the protocol {self._target.protocol}"
        answer.ended = time.perf_counter()
        return _checked(answer, prompt, self._streams)

    async def _read_stream(self, chunks: AsyncIterator[bytes], answer: LoadAnswer) -> bool:
        """Take the pieces of an answer; whether it said that it was at its end."""
        rest, ended = b"", False
        async for chunk in chunks:
            now = time.perf_counter()
            *events, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in events:
                for line in event.split(b"\n"):
                    if not line.startswith(b"data:"):
                        continue
                    if (data := line[5:].strip()) == b"[DONE]":
                        ended = True
                        continue
                    tree = orjson.loads(data)
                    if "error" in tree:
                        raise _InStream(f"in the stream: {_error_text(tree)}")
                    if self._count(tree, answer):
                        answer.arrivals.append(now)
        return ended

    def _count(self, tree: Any, answer: LoadAnswer) -> bool:
        """Take the counts out of an answer or an event; whether it holds text."""
        if self._target.protocol.startswith(("chat", "completions")):
            usage = tree.get("usage")
            if usage:
                answer.prompt, answer.output = usage["prompt_tokens"], usage.get("completion_tokens", 0)
                details = usage.get("prompt_tokens_details") or {}
                answer.cached = details.get("cached_tokens")
            return any(map(_has_text, tree.get("choices") or ()))
        if self._target.protocol == "infer":
            tree = {tensor["name"]: tensor["data"][0] for tensor in tree["outputs"]}
        answer.prompt = int(tree.get("num_input_tokens") or answer.prompt)
        own = int(tree.get("num_output_tokens") or 0)
        answer.output += own
        return bool(own or tree.get("text_output"))

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()


def _has_text(choice: Any) -> bool:
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text")) or choice.get("finish_reason") is not None
    # A token may be half a character: its piece is empty, and still the model's. The first one tells only the role.
    return bool(any(delta.get(k) for k in ("content", "reasoning", "reasoning_content", "tool_calls"))) or (
        "role" not in delta and "content" in delta
    )


class OverGRPC:
    """V2 over gRPC: `ModelInfer`, and Triton's `ModelStreamInfer` with a stream for each request."""

    def __init__(self, target: LoadTarget) -> None:
        # Takes a second to import, and only this needs it.
        import grpc
        import grpc.aio

        from kserve_vllm.protocols.oip.grpc_servicer import SERVICE, Messages

        self._target, self._grpc = target, grpc
        self._messages = messages = Messages()
        parts = urlsplit(target.url)
        address = parts.netloc
        if parts.scheme in ("grpcs", "https"):
            try:
                roots = open(target.ca, "rb").read() if target.ca else None  # noqa: SIM115
            except OSError as error:
                raise ConfigError(f"--ca {target.ca}: {error}") from None
            self._channel: Any = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(roots))
        else:
            self._channel = grpc.aio.insecure_channel(address)
        self._metadata = [(name.lower(), value) for name, value in target.headers.items() if name.lower() != "host"]
        if target.key:
            self._metadata.append(("authorization", f"Bearer {target.key}"))

        def call(method: str, kind: str) -> Any:
            own = messages.methods[method]
            return getattr(self._channel, kind)(
                f"/{SERVICE}/{method}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=messages.of(own.output_type).FromString,
            )

        self._stream = call("ModelStreamInfer", "stream_stream")
        self._infer = call("ModelInfer", "unary_unary")
        self._index = call("RepositoryIndex", "unary_unary")

    async def model(self) -> str:
        """The first of the repository's index."""
        try:
            found = await self._index(
                self._messages.RepositoryIndexRequest(), timeout=10, metadata=self._metadata, wait_for_ready=False
            )
            return str(found.models[0].name)
        except self._grpc.RpcError as error:
            raise Unreachable(f"{self._target.url}: {error.code().name}: {error.details()}; or say --model") from None
        except LookupError:
            raise Unreachable(f"{self._target.url} names no model; say it with --model") from None

    def request(self, prompt: LoadPrompt) -> Any:
        """The `ModelInferRequest`."""
        own = self._target
        request = self._messages.ModelInferRequest(model_name=own.model)
        request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(
            prompt.text.encode()
        )
        for name in ("text_output", "num_input_tokens", "num_output_tokens"):
            request.outputs.add(name=name)
        values = {"max_tokens": prompt.output, "temperature": own.temperature, **own.extra}
        if own.full_length:
            values["ignore_eos"] = True
        if own.protocol == "grpc-stream":
            values["stream"] = True
        for name, value in values.items():
            parameter = request.parameters[name]
            if isinstance(value, bool):
                parameter.bool_param = value
            elif isinstance(value, int):
                parameter.int64_param = value
            elif isinstance(value, float):
                parameter.double_param = value
            else:
                parameter.string_param = value if isinstance(value, str) else json.dumps(value)
        return request

    async def send(self, prompt: LoadPrompt) -> LoadAnswer:
        """Send one request."""
        answer = LoadAnswer()
        request = self.request(prompt)
        answer.began = time.perf_counter()
        try:
            if self._target.protocol == "grpc":
                found = await self._infer(request, timeout=self._target.timeout_s, metadata=self._metadata)
                self._count(found, answer)
            else:

                async def one() -> AsyncIterator[Any]:
                    yield request

                async for message in self._stream(one(), timeout=self._target.timeout_s, metadata=self._metadata):
                    if message.error_message:
                        answer.error = message.error_message[:_MOST_OF_AN_ERROR]
                        break
                    if self._count(message.infer_response, answer):
                        answer.arrivals.append(time.perf_counter())
        except self._grpc.RpcError as error:
            answer.error = f"{error.code().name}: {error.details()}"[:_MOST_OF_AN_ERROR]
        answer.ended = time.perf_counter()
        return _checked(answer, prompt, self._target.protocol == "grpc-stream")

    def _count(self, message: Any, answer: LoadAnswer) -> bool:
        own = 0
        for at, tensor in enumerate(message.outputs):
            if tensor.name not in ("num_input_tokens", "num_output_tokens"):
                continue
            if at < len(message.raw_output_contents):
                value = int.from_bytes(message.raw_output_contents[at][:4], "little")
            else:
                value = next(iter(tensor.contents.uint_contents), 0)
            if tensor.name == "num_input_tokens":
                answer.prompt = value or answer.prompt
            else:
                own = value
        answer.output += own
        return own > 0

    async def close(self) -> None:
        """Close its channel."""
        await self._channel.close()


def _checked(answer: LoadAnswer, prompt: LoadPrompt, streams: bool) -> LoadAnswer:
    """An answer without a token is a failure; tokens that a server does not count are the pieces that came."""
    if not answer.error:
        if not answer.output:
            answer.output = len(answer.arrivals) if streams else 0
        if not answer.output or (streams and not answer.arrivals):
            answer.error = "an answer without a token"
    return answer


def _refusal(status: int, raw: bytes) -> str:
    try:
        return f"HTTP {status}: {_error_text(orjson.loads(raw))}"[:_MOST_OF_AN_ERROR]
    except ValueError:
        return f"HTTP {status}: {raw[:200].decode(errors='replace')}"


def _error_text(tree: object) -> str:
    error = tree.get("error", tree) if isinstance(tree, dict) else tree
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _words(error: Exception) -> str:
    words = f"{type(error).__name__}: {error}"[:_MOST_OF_AN_ERROR] if str(error) else type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in words:
        return f"{words}; --ca PEM names the authority that has signed it"
    if "WRONG_VERSION_NUMBER" in words:
        return f"{words}; there is no TLS: write http://"
    return words
