"""What stands before the engine hands on what it knows, and nothing else: a newer vLLM fails here until it is read."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from kserve_vllm.core.request_context import Access, RequestContext, current
from kserve_vllm.engine.hooks.submission import SubmissionHooks, unclassified
from kserve_vllm.engine.patches.openai_stream import Call, Kind, StreamHandler, caught_calls
from kserve_vllm.engine.text_tasks import TextTasks
from kserve_vllm.policy.enforcement import may_see
from kserve_vllm.policy.tenants import Caller
from kserve_vllm.protocols.moderation import LEFT_OUT, ModeratedEngine
from tests.support import ROOT

NOTHING: Any = None

# Prompts in another form than text, which the moderation refuses or can't be reached with it: see `check_answer_form`.
UNREADABLE = {
    "prompt",
    "input",
    "prompt_token_ids",
    "prompt_embeds",
    "chat_template",
    "token_ids",
    "tokens",
    "texts",
    "features",
    "audio",
    "file",
}
# Numbers, flags and choices, and what stands around texts; whatever text they hold is looked at as any other.
SETTINGS = set(
    """add_generation_prompt add_special_tokens allowed_token_ids background best_of chat_request chat_template_kwargs
    completion_request continue_final_message dimensions early_stopping ec_transfer_params echo enable_response_messages
    frequency_penalty generate_chunk generate_response generate_responses ignore_eos include_reasoning
    include_stop_str_in_output is_3d_lora_weight kv_transfer_params length_penalty load_inplace logprob_token_ids
    logprobs lora_int_id lora_name lora_path max_completion_tokens max_output_tokens max_tokens max_tokens_per_doc
    max_tokens_per_query max_tool_calls media_io_kwargs metadata min_p min_tokens mm_processor_kwargs n output_config
    output_dimension parallel_tool_calls presence_penalty priority prompt_logprobs prompt_tokens reasoning
    reasoning_ended reasoning_parser_kwargs repetition_detection repetition_penalty return_mm_kwargs return_prompt_text
    return_token_ids return_token_offsets return_token_strs return_tokens_as_token_ids routed_experts_prompt_start
    sampling_params seed skip_special_tokens spaces_between_special_tokens stop_token_ids store stream
    stream_continuous_usage_stats stream_include_usage stream_interval stream_state temperature thinking
    thinking_token_budget token_offsets tool_choice top_k top_logprobs top_n top_p truncate_prompt_tokens
    use_activation use_beam_search vllm_xargs watermarking""".split()
)
TEXTS = set(
    """content_parts data data_1 data_2 documents hotwords images inputs instruction instructions items messages
    previous_input_messages queries query questions response_format state structured_outputs suffix system text text_1
    text_2 tools videos""".split()
)


def test_every_field_of_vllms_requests_is_known() -> None:
    entrypoints = importlib.import_module("vllm.entrypoints")
    fields: dict[str, str] = {}
    for module in pkgutil.walk_packages(entrypoints.__path__, "vllm.entrypoints."):
        # Cohere's types come with its SDK, which is not installed here.
        if not module.name.endswith(".protocol") or module.name == "vllm.entrypoints.cohere.protocol":
            continue
        for name, found in vars(importlib.import_module(module.name)).items():
            if name.endswith("Request") and isinstance(found, type) and issubclass(found, BaseModel):
                fields |= {field: f"{module.name}.{name}" for field in found.model_fields}
    known = LEFT_OUT | UNREADABLE | SETTINGS | TEXTS
    unknown = {field: where for field, where in fields.items() if field not in known}
    assert len(fields) > 120
    assert not unknown, "say what each is: a prompt in another form than text has to be refused under moderation"


def test_every_method_of_vllms_client_is_known() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert unclassified(AsyncLLM.__new__(AsyncLLM)) == []


def test_a_method_that_a_newer_vllm_adds_is_no_way_past_the_policies() -> None:
    class Client:
        """Stands for a newer vLLM's client."""

        async def generate(self) -> None: ...

        async def encode(self) -> None: ...

        async def generate_faster(self) -> str:
            return "past every policy"

    client: Any = Client()
    SubmissionHooks(client, NOTHING, prioritized=False)
    with pytest.raises(NotImplementedError, match="generate_faster"):
        client.generate_faster()


def test_the_moderated_engine_has_what_is_moderated_and_nothing_else() -> None:
    public = {name for name in dir(ModeratedEngine) if not name.startswith("_")}
    assert public == set(
        "generate embed classify score find names generates embeds classifies prioritizes shows_logprobs "
        "special_tokens".split()
    )
    assert public <= set(dir(TextTasks))
    engine = SimpleNamespace(client="raw", app="raw", dream=lambda prompt: prompt)
    for name in ("client", "app", "dream", "_prepare", "submission"):
        assert not hasattr(ModeratedEngine(engine, NOTHING), name)


def test_the_moderated_engine_can_be_asked_what_a_caller_may_see() -> None:
    """Of V2's `lora_name`, for a caller whose key names models."""
    engine: Any = SimpleNamespace(names=["base", "alias"])
    moderated = ModeratedEngine(engine, NOTHING)
    context = RequestContext("r", "v2", "e", access=Access(caller=Caller("t", models=(("base", "own-*"),))))
    token = current.set(context)
    try:
        seen = [name for name in ("alias", "own-adapter", "other") if may_see(moderated, name)]
    finally:
        current.reset(token)
    assert seen == ["alias", "own-adapter"]


def test_the_moderated_engine_has_all_that_protocols_ask_an_engine_for() -> None:
    asked: set[str] = set()
    for name in ("oip/text", "v1"):
        source = (ROOT / "runtime" / "kserve_vllm" / "protocols" / f"{name}.py").read_text()
        asked |= set(re.findall(r"\bself\._engine\.([a-z]\w*)", source))
    assert {"generate", "prioritizes"} <= asked
    assert [name for name in sorted(asked) if not hasattr(ModeratedEngine, name)] == []


class Handler:
    """Stands for vLLM's handler, with awaits wherever vLLM could have them one day."""

    engine_client: Any
    chat_completion_stream_generator: Any
    completion_stream_generator: Any

    async def create_chat_completion(self, request: Any, raw: Any) -> Any:
        await asyncio.sleep(random.random() / 50)
        generator = self.engine_client.generate(request.prompt, "params", request.id)
        await asyncio.sleep(random.random() / 50)
        # In a task of its own, as a gathering handler would.
        return await asyncio.create_task(self.finish(request, generator))

    async def finish(self, request: Any, generator: Any) -> Any:
        await asyncio.sleep(random.random() / 50)
        return self.chat_completion_stream_generator(request, generator, request.id, "demo")


def test_no_request_gets_another_ones_prompt_whatever_is_awaited_in_between() -> None:
    streams: Any = StreamHandler.__new__(StreamHandler)
    streams.client, streams._engine = SimpleNamespace(), SimpleNamespace(short_prompts=None)
    streams._shape = lambda *_: ()
    kind: Kind = "chat"
    twin = streams.without_last_step(kind, Handler())

    async def ask(number: int) -> tuple[int, Call]:
        request = SimpleNamespace(prompt=f"prompt {number}", id=f"id {number}")
        token = caught_calls.set([])
        try:
            return number, (await twin.create_chat_completion(request, None)).call
        finally:
            caught_calls.reset(token)

    async def all_at_once() -> list[tuple[int, Call]]:
        return await asyncio.gather(*map(ask, range(64)))

    for number, ((prompt, _, request_id), _) in asyncio.run(all_at_once()):
        assert (prompt, request_id) == (f"prompt {number}", f"id {number}")
