"""What a request for one token costs the front end, layer by layer, in microseconds of processor time.

    python -m tests.benchmarks.intake [--prompt-tokens 600] [--requests 300] [--no rendering answers]

The layers are called in this process, one after the other, without sockets and without an engine (`instant_engine`):
each is what it takes with all that is below it. Prompts are new each time, as in the bench's mode `intake`; the last
line asks the same few again, as in `prefix-hot`. Least of several runs, since the machine is never quiet.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from kserve_vllm.config import demo
from kserve_vllm.config.settings import SHORTCUTS
from tests.benchmarks.load import prompt
from tests.benchmarks.servers import ENGINE_ENV, MODEL

_RUNS = 7
_HOT = 16


def bodies(count: int, words: int, seed: int) -> list[bytes]:
    """Chats as clients write them."""
    rng = random.Random(seed)
    return [
        orjson.dumps(
            {
                "model": MODEL,
                "max_tokens": 1,
                "ignore_eos": True,
                "temperature": 0.0,
                "messages": [{"role": "user", "content": prompt(rng, words)}],
            }
        )
        for _ in range(count)
    ]


async def started(left_out: list[str]) -> Any:
    """Our engine's client and vLLM's app, with all shortcuts but these."""
    from kserve_vllm.engine.arguments import parse_engine_args
    from kserve_vllm.engine.compat import Shortcuts
    from kserve_vllm.engine.vllm import VLLMEngine

    flags = ["--model", str(demo.folder("model")), "--served-model-name", MODEL, "--max-model-len", "2048"]
    engine = VLLMEngine(parse_engine_args([*flags, "--enforce-eager"]))
    await engine.start()
    engine.shorten(Shortcuts([name for name in SHORTCUTS if name not in left_out]))
    return engine


async def cost_us(work: Callable[[Any], Awaitable[object]], make: Callable[[int], list[Any]]) -> float:
    """Processor time of one call; the arguments are made anew for each run, outside of the clock."""
    least = float("inf")
    for run in range(_RUNS):
        arguments = make(run)
        began = time.process_time()
        for each in arguments:
            # What may be done in one pass of the event loop is bounded.
            await asyncio.sleep(0)
            await work(each)
        least = min(least, (time.process_time() - began) / len(arguments))
    return 1e6 * least


async def layers(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Name and cost of each layer."""
    from fastapi import Request

    from kserve_vllm.engine.patches.openai_answer import AnswerHandler
    from kserve_vllm.engine.patches.openai_stream import validated
    from kserve_vllm.protocols.openai.fast_path import streamable

    engine = await started(args.no)
    answers = AnswerHandler(engine)
    handler: Any = answers.handlers["chat"]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}

    seeds = itertools.count(1)

    def raw(_: int) -> list[bytes]:
        return bodies(args.requests, args.prompt_tokens, next(seeds))

    def hot(run: int) -> list[bytes]:
        return bodies(_HOT, args.prompt_tokens, 0) * (args.requests // _HOT)

    def models(run: int) -> list[Any]:
        return [validated("chat", orjson.loads(each)) for each in raw(run)]

    def texts(run: int) -> list[str]:
        return [orjson.loads(each)["messages"][0]["content"] for each in raw(run)]

    backend = engine.client.renderer.tokenizer._tokenizer

    async def tokenize(text: str) -> None:
        assert backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    async def called(text: str) -> None:
        assert engine.client.renderer.tokenizer(text)["input_ids"]

    async def parse(body: bytes) -> None:
        orjson.loads(body)

    async def validate(body: bytes) -> None:
        validated("chat", orjson.loads(body))

    async def render(request: Any) -> None:
        await handler.render_chat_request(request)

    async def handle(request: Any) -> None:
        await handler.create_chat_completion(request, Request(dict(scope)))

    async def whole(body: bytes) -> None:
        tree = orjson.loads(body)
        engine.mender.mend("/v1/chat/completions", tree)
        question = answers.take("chat", tree, dict(scope), streamable("chat", tree))
        assert question is not None
        assert (await question.answer()).status == 200

    await cost_us(whole, lambda run: raw(run)[:20])
    return [
        ("JSON of the body", await cost_us(parse, raw)),
        ("vLLM's model of it", await cost_us(validate, raw)),
        ("the tokenizer, called as vLLM does", await cost_us(called, texts)),
        ("the library's tokens alone", await cost_us(tokenize, texts)),
        ("prompt: template and tokens", await cost_us(render, models)),
        ("vLLM's handler, with the engine's client", await cost_us(handle, models)),
        ("from the body's bytes to the answer's", await cost_us(whole, raw)),
        ("the same for prompts that were there before", await cost_us(whole, hot)),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt-tokens", type=int, default=600)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--no", nargs="*", default=[], choices=list(SHORTCUTS), help="shortcuts to leave out")
    args = parser.parse_args()
    os.environ.update(ENGINE_ENV)
    from tests.benchmarks import instant_engine

    instant_engine.STEP_S = 0.0
    instant_engine.install()
    for name, cost in asyncio.run(layers(args)):
        print(f"{cost:8.0f} us  {name}")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
