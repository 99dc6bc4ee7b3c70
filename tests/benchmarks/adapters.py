"""What a request to an adapter costs more than one to the base model: microseconds of processor time.

python -m tests.benchmarks.adapters

Real are the table of adapters, its side in vLLM, the engine, the accounting and vLLM's output processor. What stands
in for the engine answers each request with one token.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvloop

from kserve_vllm.adapters.files import Declaration
from kserve_vllm.adapters.registry import Adapter, AdapterRegistry, AdapterState, Version
from kserve_vllm.core.lifecycle import Lifecycle
from kserve_vllm.core.request_context import RequestContext, current
from kserve_vllm.engine.hooks.accounting import TokenAccounting
from kserve_vllm.engine.hooks.submission import SubmissionHooks
from kserve_vllm.engine.loras import LoRAs
from kserve_vllm.engine.served_models import ServedModels
from kserve_vllm.policy.enforcement import Policies, SequencePolicy
from kserve_vllm.telemetry.metrics import Metrics
from tests.benchmarks.policies import RUNS, TIMES

BASE = "demo"
COUNTS = (100, 1000)
TURNS = 5


class Client:
    """In the place of vLLM's client: a real output processor, and an engine that stops at once."""

    def __init__(self) -> None:
        from vllm.v1.engine.output_processor import OutputProcessor

        self.output_processor = OutputProcessor(None, log_stats=True)
        self.vllm_config = SimpleNamespace(lora_config=SimpleNamespace(max_lora_rank=8))
        self.encode = None

    async def generate(
        self, prompt: Any, params: Any, request_id: str, lora_request: Any = None
    ) -> AsyncGenerator[Any, None]:
        """One token."""
        from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
        from vllm.v1.metrics.stats import IterationStats

        ids = prompt["prompt_token_ids"]
        request = EngineCoreRequest(request_id, ids, None, params, None, 0.0, lora_request, None, None)
        request.external_req_id = request_id
        self.output_processor.add_request(request, None)
        output = EngineCoreOutput(request_id, [1], finish_reason=FinishReason.STOP)
        yield self.output_processor.process_outputs([output], 0.0, IterationStats()).request_outputs[0]


class Site:
    """Everything that a request to an adapter passes.

    Args:
        count: adapters that are loaded.
    """

    def __init__(self, count: int) -> None:
        from vllm import SamplingParams

        self.client: Any = Client()
        self.params = SamplingParams(max_tokens=16)
        self.registry = SimpleNamespace(
            base_model_paths=[SimpleNamespace(name=BASE, model_path="/demo")],
            lora_requests={},
            model_name=lambda lora: BASE,
        )
        loras = LoRAs(self.client)
        loras.attach(self.registry)
        self.table = loras.adapters = AdapterRegistry(loras)
        registry: Any = self.registry
        self.models = ServedModels(registry, self.table)
        for number in range(1, count + 1):
            name, version = f"adapter-{number}", Version(f"adapter-{number}@0123456789ab", number, Path("/none"))
            self.table.entries[name] = Adapter(Declaration(name, "/none"), "file", AdapterState.LOADED, version=version)
            loras.publish(name, version)
        TokenAccounting(self.client.output_processor, lambda: BASE, loras)
        lifecycle, policies = Lifecycle(), Policies()
        SubmissionHooks(
            self.client,
            SequencePolicy(policies, self.models),
            False,
            plain=loras.plain,
        )
        from prometheus_client import CollectorRegistry

        self.metrics = Metrics(lifecycle, lambda: 0, registry=CollectorRegistry())
        self.metrics.attach("", self.models.serves, self.table.by_state)

    async def ask(self, name: str) -> RequestContext:
        """One request, from the look for its model to its books."""
        context = RequestContext("r", "v2", "ModelInfer", model=name)
        current.set(context)
        found = self.models.find(name)
        assert found is not None
        assert found.loaded
        lora = self.registry.lora_requests.get(name)
        prompt = {"type": "token", "prompt_token_ids": [1, 2, 3]}
        async for _ in self.client.generate(prompt, self.params, "r", lora_request=lora):
            pass
        self.registry.model_name(lora)
        self.metrics.model_label(context.model)  # for the metrics
        self.metrics.model_label(context.model)  # for the log
        return context


async def main() -> None:
    """Print one line per figure."""
    for count in COUNTS:
        site = Site(count)
        name = f"adapter-{count // 2}"
        context = await site.ask(f"{BASE}:{name}")
        assert (context.adapter, site.table.find(name).requests) == (name, 1)  # type: ignore[union-attr]
        least = dict.fromkeys((BASE, name, f"{BASE}:{name}"), float("inf"))
        # In turns, since what is compared is small beside what other programs do to all of it.
        for _ in range(RUNS * TURNS):
            for asked in least:
                begin = time.process_time()
                for _ in range(TIMES):
                    await site.ask(asked)
                least[asked] = min(least[asked], (time.process_time() - begin) / TIMES * 1e6)
        for asked, us in least.items():
            print(f"{us:8.1f} us  {asked}, with {count:,} adapters: {us - least[BASE]:+.1f}", flush=True)


if __name__ == "__main__":
    uvloop.run(main())
