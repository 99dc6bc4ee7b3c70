"""A server whose engine is not there: the front end is all that is measured, and no other process wants a processor.

    python -m tests.benchmarks.instant_engine ours serve --model ...     our command
    python -m tests.benchmarks.instant_engine vllm serve MODEL ...       vLLM's

What stands in for the engine gives every request in flight a token each `STEP_S` seconds, from within the front end's
own process: the same token texts again and again. Requests are written as they would be for the engine, and outputs are
read as they come from it; only the sockets between are left out. Figures of processor time are without the engine's
wake-ups, and so lower than those against a real one.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
import types
from typing import Any

STEP_S = 0.004


def install() -> None:
    """Let vLLM's `AsyncLLM` of this process have such an engine."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
    from vllm.v1.metrics.stats import PrefillStats, SchedulerStats
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    class Instant(AsyncMPClient):  # type: ignore[misc]
        """Instead of a client of an engine in another process."""

        def __init__(self, config: Any, tokens: list[int]) -> None:
            config.cache_config.num_gpu_blocks = 1024
            self.encoder, self.decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
            self.resources = types.SimpleNamespace(engine_dead=False)
            self.engine_ranks_managed = [0]
            self.asked: dict[str, Any] = {}
            self.given: dict[str, int] = {}
            self.came = asyncio.Event()
            self.tokens = itertools.cycle(tokens)
            self.next_step = 0.0

        async def add_request_async(self, request: Any) -> None:
            self.encoder.encode(request)
            self.asked[request.request_id] = request
            self.given[request.request_id] = 0
            self.came.set()

        async def abort_requests_async(self, request_ids: list[str]) -> None:
            for name in request_ids:
                self.asked.pop(name, None)

        async def get_output_async(self) -> Any:
            if not self.asked:
                self.came.clear()
                await self.came.wait()
            await asyncio.sleep(max(0.0, self.next_step - time.monotonic()))
            self.next_step = time.monotonic() + STEP_S
            outputs, token = [], next(self.tokens)
            for name, request in list(self.asked.items()):
                done = self.given[name] = self.given[name] + 1
                output = EngineCoreOutput(request_id=name, new_token_ids=[token])
                if done == 1:
                    size = len(request.prompt_token_ids)
                    output.prefill_stats = PrefillStats(size, size, 0, 0, 0, size)
                if done >= request.sampling_params.max_tokens:
                    output.finish_reason = FinishReason.LENGTH
                    del self.asked[name]
                outputs.append(output)
            made = EngineCoreOutputs(outputs=outputs, scheduler_stats=SchedulerStats(num_running_reqs=len(outputs)))
            return self.decoder.decode(self.encoder.encode(made))

        async def get_supported_tasks_async(self) -> tuple[str, ...]:
            return ("generate",)

        async def call_utility_async(self, method: str, *args: Any) -> Any:
            return False if method == "is_scheduler_paused" else None

        def shutdown(self, timeout: float | None = None) -> None:
            self.asked.clear()

    def made(vllm_config: Any, *args: Any, renderer: Any = None, **kwargs: Any) -> Any:
        text = "17 + 25 is 42, and the sum of both numbers is what you asked for. " * 3
        return Instant(vllm_config, renderer.tokenizer.encode(text, add_special_tokens=False))

    EngineCoreClient.make_async_mp_client = staticmethod(made)  # type: ignore[method-assign]


def main() -> None:
    """Run one of the two commands."""
    which = sys.argv.pop(1)
    if which == "vllm":
        from tests.benchmarks import vllm_command

        vllm_command.main(install)
        return
    install()
    from kserve_vllm.cli.command import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
