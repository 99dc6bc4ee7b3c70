"""Requests through every protocol, good ones and bad ones."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np

from tests.support import Server
from tests.triton import client as triton

PROMPT = "Tell me about marmalade, please."
"""Holds a word that no log may hold."""
SECRET_WORD = "marmalade"
LONG: Mapping[str, Any] = {"max_tokens": 24, "min_tokens": 24, "ignore_eos": True, "temperature": 0.0}


class Client:
    """Asks one server with one key.

    Args:
        server: the server.
        key: API key, or nothing.
        headers: further headers and gRPC metadata.
    """

    def __init__(self, server: Server, key: str = "", headers: Mapping[str, str] | None = None) -> None:
        self.server = server
        self.headers = {"authorization": f"Bearer {key}", **(headers or {})} if key else dict(headers or {})

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """POST JSON."""
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(self.server.url + path, json=body, headers={**self.headers, **more}, timeout=120)

    def chat(self, model: str = "demo", **headers: str) -> httpx.Response:
        """A chat completion."""
        body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], **LONG}
        return self.post("/v1/chat/completions", body, **headers)

    def chat_stream(self, model: str = "demo", **headers: str) -> list[dict[str, Any]]:
        """The chunks of a streamed chat completion."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": PROMPT}],
            "stream": True,
            **LONG,
            "stream_options": {"include_usage": True},
        }
        response = self.post("/openai/v1/chat/completions", body, **headers)
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def infer(self, model: str = "demo", **headers: str) -> httpx.Response:
        """V2 infer with two prompts."""
        tensor = {"name": "text_input", "datatype": "BYTES", "shape": [2], "data": [PROMPT, PROMPT]}
        return self.post(f"/v2/models/{model}/infer", {"inputs": [tensor], "parameters": dict(LONG)}, **headers)

    def generate(self, stream: bool = False, **headers: str) -> httpx.Response:
        """V2's generate extension."""
        path = "/v2/models/demo/generate" + ("_stream" if stream else "")
        return self.post(path, {"text_input": PROMPT, "parameters": dict(LONG)}, **headers)

    def predict(self, **headers: str) -> httpx.Response:
        """V1 predict."""
        return self.post("/v1/models/demo:predict", {"instances": [PROMPT], "parameters": dict(LONG)}, **headers)

    def grpc_infer(self, model: str = "demo", **headers: str) -> str:
        """ModelInfer."""
        with contextlib.closing(triton.InferenceServerClient(self.server.grpc_address)) as client:
            result = client.infer(model, _tensors(False), headers={**self.headers, **headers})
            return str(result.as_numpy("text_output")[0])

    def grpc_stream(self, **headers: str) -> int:
        """ModelStreamInfer; the number of answers."""
        count, done = 0, threading.Event()

        def receive(result: Any, error: Any) -> None:
            nonlocal count
            if error is not None:
                done.set()
                return
            count += 1
            if result.get_response().parameters["triton_final_response"].bool_param:
                done.set()

        with contextlib.closing(triton.InferenceServerClient(self.server.grpc_address)) as client:
            client.start_stream(receive, headers={**self.headers, **headers})
            client.async_stream_infer("demo", _tensors(True))
            assert done.wait(60)
            client.stop_stream()
        return count

    def give_up(self) -> None:
        """Begin to read a long stream, then go away."""
        body = {
            "model": "demo",
            "prompt": PROMPT,
            "stream": True,
            "max_tokens": 900,
            "min_tokens": 900,
            "ignore_eos": True,
        }
        with httpx.stream("POST", self.server.url + "/v1/completions", json=body, headers=self.headers) as response:
            next(response.iter_lines())

    def everything(self) -> None:
        """One of each, good and bad."""
        assert self.chat().status_code == 200
        assert self.chat("upper").status_code == 200
        assert self.chat_stream()[-1]["usage"]["completion_tokens"] == LONG["max_tokens"]
        assert self.infer().status_code == 200
        assert self.generate().status_code == 200
        assert self.generate(stream=True).status_code == 200
        assert self.predict().status_code == 200
        assert self.grpc_infer()
        assert self.grpc_stream() > 1
        assert self.chat("no-such-model").status_code == 404
        assert self.infer("no-such-model").status_code == 404
        with contextlib.suppress(triton.InferenceServerException):
            self.grpc_infer("no-such-model")
        self.give_up()


def _tensors(stream: bool) -> list[Any]:
    text = triton.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([PROMPT.encode()], dtype=object))
    sampling = triton.InferInput("sampling_parameters", [1], "BYTES")
    sampling.set_data_from_numpy(np.array([json.dumps(dict(LONG)).encode()], dtype=object))
    flag = triton.InferInput("stream", [1], "BOOL")
    flag.set_data_from_numpy(np.array([stream]))
    return [text, sampling, flag]
