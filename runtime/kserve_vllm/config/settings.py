"""The tree of typed settings, and where each value came from.

Six groups: `model`, `server`, `lifecycle`, `telemetry`, `policy` and `engine`. All but the last are declared here, one
field a setting; a field's name gives its flag (`http_port`: `--http-port`), its variable (`KSERVE_VLLM_HTTP_PORT`) and
its place in the YAML file (`server.http_port`). The last holds vLLM's own engine flags, which vLLM's own parser checks.

Sources, strongest first: flags, variables, the file, the profile (engine flags alone), defaults.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from kserve_vllm.core.errors import ConfigError

if TYPE_CHECKING:
    from pydantic.config import JsonDict

ENV_PREFIX = "KSERVE_VLLM_"
_LINK_SUFFIX = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_\w+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?$")
_LINK_VALUE = re.compile(r"^(tcp|udp|sctp)://")


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _setting(default: Any, help_text: str, aliases: Sequence[str] = (), **limits: Any) -> Any:
    extra: JsonDict = {"aliases": list(aliases)}
    if isinstance(default, list):
        return Field(default_factory=lambda: list(default), description=help_text, json_schema_extra=extra, **limits)
    return Field(default=default, description=help_text, json_schema_extra=extra, **limits)


Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]


class ModelSettings(_Group):
    """What is served, and under which name."""

    model: str | None = _setting(
        None,
        "Model to serve: a folder or a Hugging Face id. Default: /mnt/models where that folder exists.",
        ["model-id"],
    )
    model_dir: str | None = _setting(None, "KServe's spelling of a model folder; the same as --model FOLDER.")
    model_name: list[str] = _setting(
        [],
        "Name under which clients ask for the model; may be given several times. Default: the model's id, "
        "and the last part of it.",
        ["served-model-name"],
    )
    demo: bool = _setting(False, "Serve the small demo model that comes with the package, with its two adapters.")
    profile: str = _setting(
        "balanced",
        "A set of engine flags: balanced, high-throughput, low-latency, cost-optimized or long-context. "
        "`kserve-vllm profiles` shows what each one sets.",
    )
    compact_json: bool = _setting(
        True,
        "Generate JSON under a schema without white space between its parts, which a model may otherwise write until "
        "its tokens are used up; --compact-json false lets the model choose.",
    )
    strict_openai: bool = _setting(
        False,
        "Refuse what vLLM does not and OpenAI does, or does in another way: a chat, completion, response or embedding "
        "without `model`, which the served model answers otherwise; tools of a response that the server would run "
        "(web_search, ...), which are left out otherwise.",
    )
    adapters_file: str | None = _setting(
        None,
        "YAML or JSON file that declares adapters (LoRA): `adapters: [{name, source, description, revision}]`. Watched "
        "while the server runs. Switches --enable-lora on.",
    )
    warmup_file: str | None = _setting(
        None,
        "YAML or JSON list of system prompts, or of {model, system, messages, prompt}, that are run through the prefix "
        "cache before ready and again when the file changes.",
    )


SHORTCUTS: Mapping[str, str] = {
    "answers": "whole answers of chats and completions, past vLLM's web framework",
    "streams": "streams of chats and completions, written from bytes",
    "rendering": "short prompts, rendered and tokenized on the event loop",
    "outputs": "outputs of nothing but tokens, processed in one function",
    "texts": "texts of whole answers, made once at their end",
    "grpc-server": "a gRPC server of our own",
    "grpc-streams": "gRPC streams of text, written from bytes",
    "forked-start": "on a CPU, vLLM's processes copied from one that imports while the front end does",
}
"""What `--fast-path` may name."""


def _shortcuts(given: object) -> object:
    """`--fast-path` as a list of names; `true` and `false` are its older spelling."""
    if isinstance(given, bool):
        return ["all" if given else "none"]
    words = given if isinstance(given, list) else [given]
    names = [part.strip() for word in words for part in str(word).split(",") if part.strip()]
    older = {
        "true": "all",
        "1": "all",
        "yes": "all",
        "on": "all",
        "false": "none",
        "0": "none",
        "no": "none",
        "off": "none",
    }
    found = [older.get(name.lower(), name) for name in names] or ["all"]
    unknown = [name for name in found if name not in {"all", "none", *SHORTCUTS}]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is none of all, none, {', '.join(SHORTCUTS)}")
    if len(found) > 1 and {"all", "none"} & set(found):
        raise ValueError("`all` and `none` stand alone")
    return found


class ServerSettings(_Group):
    """Where the process listens and what it lets in."""

    host: str = _setting("0.0.0.0", "Address to listen on, for HTTP and gRPC.")  # noqa: S104
    http_port: Port = _setting(8080, "Port for OpenAI, V2 REST, V1, health and metrics.", ["port"])
    http2: bool = _setting(
        True,
        "Speak HTTP/2 on the HTTP port, too: in clear text with prior knowledge, or as TLS's ALPN says. gRPC is then "
        "answered there as well, beside all else.",
    )
    grpc_port: Port = _setting(
        8081, "Port for V2 gRPC alone; 0: none, and gRPC is answered on the HTTP port (--http2) or not at all."
    )
    grpc_server: Literal["auto", "own", "grpcio", "off"] = _setting(
        "auto",
        "Who answers gRPC: own (our server, which costs less CPU for each token), grpcio (the grpcio package's, which "
        "can't share the HTTP port), off (nobody), or auto: our own if it passes a test at the start, else grpcio's, "
        "which the log and kserve_vllm_grpc_fallback then say.",
    )
    max_body_mib: int = _setting(64, "Largest request body in MiB; a larger one is answered 413.", ge=1, le=2047)
    max_json_mib: int = _setting(
        20,
        "Largest JSON of an HTTP request in MiB, images in it included; more is answered 413. Each MiB holds up "
        "all else for about 10 ms while it is decoded. Binary tensors and uploads are bounded by --max-body-mib alone.",
        ge=1,
        le=2047,
    )
    body_timeout: Seconds = _setting(
        60.0,
        "How long a client may take to send a request's body, or one message over gRPC, in seconds; then 408 or "
        "DEADLINE_EXCEEDED. 0: as long as it likes.",
    )
    max_connections: int = _setting(
        4096,
        "Most open connections of the HTTP port. One more closes the one that has waited longest for a request; where "
        "all have one, it is answered 503. Over HTTP/2, where a connection has many, also most requests at once.",
        ge=16,
        le=1_000_000,
    )
    max_batch: int = _setting(512, "Most texts in one V1 or V2 request; more is answered 400.", ge=1, le=65_536)
    admin_port: Port = _setting(
        0,
        "Port for metrics and for calls that need an admin key; they are then answered there and no longer on the "
        "HTTP port. 0: all on the HTTP port.",
    )
    ui: bool = _setting(
        False,
        "Serve a page at /ui with live figures and a chat, on the admin port, or on the HTTP port where there is none. "
        "It uses the public API with the key that its visitor types in. On with --demo.",
    )
    api_server_count: int = _setting(
        1,
        "Front-end processes that take requests for one engine, for when one process is busy with tokenizing, checking "
        "and streaming while the engine waits. Limits then want --redis-url.",
        ge=1,
        le=64,
    )
    allow_model_control: bool = _setting(
        False,
        "Where there is no key file: let every client load and unload models and adapters, and make the other calls "
        "that change the server's state. With a key file those need a key marked `admin`.",
    )
    allow_transfer_params: bool = _setting(
        False,
        "Take kv_transfer_params and ec_transfer_params, by which a router of disaggregated prefill says where a "
        "prompt's cache and token ids are, and X-data-parallel-rank. Whoever sends them chooses which hosts the engine "
        "connects to and whose cache it reads: only where no client reaches this server past that router.",
    )
    api_key: list[SecretStr] = _setting(
        [],
        "Key that every request must carry as `Authorization: Bearer KEY`; may be given several times. "
        "Probes and metrics stay open.",
    )
    ssl_certfile: str | None = _setting(
        None,
        "PEM file with the certificate chain; switches TLS on, for HTTP and gRPC. Where nothing else names it: the "
        "variable KSERVE_TLS_CERT_FILE.",
    )
    ssl_keyfile: str | None = _setting(
        None,
        "PEM file with the certificate's private key, where that is not in --ssl-certfile; or the variable "
        "KSERVE_TLS_KEY_FILE.",
    )
    enable_ssl_refresh: bool = _setting(
        True,
        "Read the TLS files again when they change; open connections stay. --enable-ssl-refresh false keeps those of "
        "the start.",
    )
    access_log: bool = _setting(False, "Write a line per HTTP request.")
    fast_path: Annotated[list[str], BeforeValidator(_shortcuts)] = _setting(
        ["all"],
        "Shortcuts past objects of vLLM, KServe and grpcio that are slower and do the same: all, none, or a list of "
        f"{', '.join(SHORTCUTS)}, to leave out one. true and false mean all and none. Default: all.",
    )

    @property
    def shortcuts(self) -> frozenset[str]:
        """Names of the shortcuts that are wanted."""
        if self.fast_path == ["all"]:
            return frozenset(SHORTCUTS)
        return frozenset(self.fast_path) & frozenset(SHORTCUTS)


class LifecycleSettings(_Group):
    """How the process starts, notices a dead engine, and ends. All in seconds."""

    drain_timeout: Seconds = _setting(
        60.0, "After SIGTERM, how long requests in flight may take to finish. Keep it below the pod's grace period."
    )
    drain_delay: Seconds = _setting(
        0.0, "After SIGTERM, how long new requests are still taken while endpoints catch up."
    )
    engine_dead_exit_after: Seconds = _setting(
        10.0, "How long the process stays up after the engine died, to answer what was in flight; then it exits 1."
    )
    engine_probe_interval: float = _setting(
        5.0, "How often the engine and its workers are asked for a sign of life.", gt=0, le=3600
    )
    engine_stall_timeout: float = _setting(
        60.0,
        "How long the engine may owe that sign of life before it counts as hanging. Must be longer than the "
        "longest single step of the model.",
        gt=0,
        le=86_400,
    )
    start_stall_timeout: Seconds = _setting(
        40.0,
        "How long the start may stand still (no processor time, nothing read or written in any process) before it "
        "counts as failed and the process exits 1. 0: as long as it likes; so it is where other nodes are waited for.",
    )
    termination_message_path: str = _setting(
        "/dev/termination-log",
        "File that gets one sentence on why the process ended, where it exists: Kubernetes' terminationMessagePath.",
    )


class TelemetrySettings(_Group):
    """What an operator sees."""

    log_format: Literal["auto", "json", "console"] = _setting(
        "auto", "Form of the log: json (an object a line), console (readable lines), or auto: console on a terminal."
    )
    otlp_endpoint: str | None = _setting(
        None,
        "URL of an OpenTelemetry collector; switches traces on. Over gRPC, such as http://collector:4317, or over HTTP "
        "with OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf. Where nothing else names it: OTEL_EXPORTER_OTLP_ENDPOINT.",
    )
    trace_sample_ratio: float = _setting(
        1.0,
        "Share of traces that is recorded, 0 to 1, where the caller has not decided already. Where nothing else says "
        "it: OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG.",
        ge=0,
        le=1,
    )


class PolicySettings(_Group):
    """Who may ask, how much, and in which order. Everything is off by default."""

    keys_file: str | None = _setting(
        None,
        "YAML or JSON file with API keys (as SHA-256), tenants, tiers and limits; read again when it changes. "
        "`kserve-vllm keys` manages it.",
    )
    redis_url: SecretStr | None = _setting(
        None,
        "Redis or Valkey that replicas share for limits and the response cache, such as redis://host:6379/0 or "
        "rediss://user:password@host. Without it each replica counts for itself.",
    )
    redis_away: Literal["allow", "deny"] = _setting(
        "allow",
        "What becomes of requests with limits while Redis can't be reached: allow (each front-end process of each "
        "replica limits for itself) or deny (503).",
    )
    redis_timeout: float = _setting(
        0.25,
        "Seconds within which Redis must answer; then it counts as away until a probe finds it. A request waits no "
        "longer than this for it.",
        gt=0,
        le=60,
    )
    requests_per_minute: int = _setting(0, "Most requests in any 60 s for the whole service; 0: no limit.", ge=0)
    tokens_per_minute: int = _setting(
        0, "Most tokens (prompt and generated) in any 60 s for the whole service; 0: no limit.", ge=0
    )
    max_concurrent: int = _setting(
        0, "Most requests that the engine works on at once; more wait in a queue by class. 0: no queue.", ge=0
    )
    queue_size: int = _setting(1024, "Most requests that wait; a lower class makes room for a higher one.", ge=0)
    queue_class_size: list[str] = _setting(
        [], "Most requests of one class that wait, such as batch=100; may be given several times."
    )
    queue_timeout: Seconds = _setting(30.0, "How long a request may wait in the queue, in seconds; then 503.")
    class_share: list[str] = _setting(
        [],
        "Most of --max-concurrent that one class may hold, as a share, such as batch=0.25; may be given several times. "
        "Default: low=0.75, batch=0.5.",
    )
    default_priority: Literal["critical", "high", "normal", "low", "batch"] = _setting(
        "normal", "Class of requests whose tenant or tier names none."
    )
    response_cache: Literal["off", "memory", "redis"] = _setting(
        "off", "Keep answers to deterministic requests (temperature 0 or a seed) and give them again."
    )
    cache_max_mib: int = _setting(64, "Size of the response cache in memory, in MiB.", ge=1)
    cache_ttl: float = _setting(3600.0, "How long an answer is kept, in seconds.", gt=0)
    cache_scope: Literal["tenant", "shared"] = _setting(
        "tenant", "Whether a tenant gets answers that were made for another one (shared)."
    )
    moderation_file: str | None = _setting(
        None, "YAML file with hooks that look at prompts and answers: patterns, a moderation endpoint, Python code."
    )
    batch_dir: str | None = _setting(
        None,
        "Folder (a claim, which replicas may share), or s3://BUCKET/PREFIX, for OpenAI's files and batches: switches "
        "/v1/files and /v1/batches on. A folder's file system has to keep locks (flock), an object store conditions of "
        "writes.",
    )
    batch_concurrency: int = _setting(
        8,
        "Most requests of batches that are worked on at once while nobody else asks; beside other requests it is one "
        "at a time.",
        ge=1,
        le=1024,
    )
    batch_max_lines: int = _setting(50_000, "Most requests in one batch.", ge=1, le=1_000_000)
    batch_max_files: int = _setting(500, "Most files, and most batches, that are kept for one tenant.", ge=1, le=10_000)
    batch_max_mib: int = _setting(
        4096, "Most MiB of files that are kept for one tenant; results count, but are never cut off.", ge=1
    )
    usage_sink: SecretStr | None = _setting(
        None, "Where a JSON record per request goes: log, file:PATH, or an http(s) URL."
    )


GROUPS: Mapping[str, type[_Group]] = {
    "model": ModelSettings,
    "server": ServerSettings,
    "lifecycle": LifecycleSettings,
    "telemetry": TelemetrySettings,
    "policy": PolicySettings,
}


@dataclass(frozen=True)
class EngineFlag:
    """One engine flag for vLLM's parser.

    Attributes:
        name: canonical name: no dashes in front, no `no-`, dashes for underscores, nothing after a dot.
        key: what overrides what: the name with its dotted part.
        tokens: the command-line words, already split.
        source: where it came from, for people.
    """

    name: str
    key: str
    tokens: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Settings:
    """The effective settings.

    Attributes:
        model, server, lifecycle, telemetry, policy: the typed groups.
        engine: vLLM's flags, weakest source first; at most one source per key.
        sources: `group.field` to where its value came from.
    """

    model: ModelSettings
    server: ServerSettings
    lifecycle: LifecycleSettings
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    engine: tuple[EngineFlag, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def engine_argv(self) -> list[str]:
        """All engine flags as one argument list for vLLM's parser."""
        return [token for flag in self.engine for token in flag.tokens]


# What vLLM keeps in the process that was asked, and what answers wrongly when the next request meets another one.
_ONE_PROCESS_FLAGS = {
    "enable-server-load-tracking": "/load would tell of one process",
    "max-num-queued-tokens": "vLLM counts these in each process alone (--max-num-queued-reqs holds for all together)",
}
_ONE_PROCESS_VARIABLES = {
    "VLLM_ENABLE_RESPONSES_API_STORE": "keeps responses in one process",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "loads adapters into one process; use --adapters-file",
}


def check_front_ends(settings: Settings, environ: Mapping[str, str]) -> None:
    """Refuse what would hold, count or answer for one of several front ends only.

    Raises:
        ConfigError: there is such a setting.
    """
    policy, count = settings.policy, settings.server.api_server_count
    given = f"--api-server-count {count} (from {settings.sources['server.api_server_count']})"
    counted = [
        flag_name(name) for name in ("keys_file", "requests_per_minute", "tokens_per_minute") if getattr(policy, name)
    ]
    if counted and policy.redis_url is None:
        raise ConfigError(
            f"{given} and --{counted[0]}: without Redis every process counts for itself, and {count} of them would "
            f"let {count} times a limit pass. Give --redis-url, or leave --api-server-count at 1"
        )
    if policy.max_concurrent:
        raise ConfigError(
            f"{given} and --max-concurrent: that queue stands in one process. Leave --api-server-count at 1, or bound "
            "the engine itself with --max-num-seqs and --max-num-queued-reqs, which hold for all processes together"
        )
    for flag in settings.engine:
        if flag.name in _ONE_PROCESS_FLAGS and not flag.tokens[0].startswith("--no-"):
            raise ConfigError(f"{given} and --{flag.name}: {_ONE_PROCESS_FLAGS[flag.name]}. Leave one of them out")
    for name, why in _ONE_PROCESS_VARIABLES.items():
        if _is_on(name, environ):
            raise ConfigError(f"{given} and the variable {name}, which {why}. Leave one of them out")


_POLICED = {
    "VLLM_ENABLE_RESPONSES_API_STORE": (
        ("keys_file", "requests_per_minute", "tokens_per_minute", "max_concurrent"),
        "vLLM's store gives a response to whoever names its id, and works in the background under no limit",
    ),
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": (
        ("response_cache",),
        "answers of weights that were replaced in place would stay in the cache; use --adapters-file",
    ),
    "VLLM_SERVER_DEV_MODE": (
        ("response_cache",),
        "answers of weights that were replaced in place (/update_weights) would stay in the cache",
    ),
}


def check_variables(settings: Settings, environ: Mapping[str, str]) -> None:
    """Refuse vLLM's switches that get around a policy that is on.

    Raises:
        ConfigError: there is such a variable.
    """
    for variable, (names, why) in _POLICED.items():
        on = [flag_name(name) for name in names if getattr(settings.policy, name) not in (None, 0, "off", [])]
        if on and _is_on(variable, environ):
            raise ConfigError(f"--{on[0]} and the variable {variable}: {why}. Leave one of them out")


def _is_on(variable: str, environ: Mapping[str, str]) -> bool:
    """Whether a switch of vLLM's is set, as vLLM reads it."""
    return environ.get(variable, "0").lower() not in ("", "0", "false")


def fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """Every declared setting as (group, field name, field)."""
    for group, cls in GROUPS.items():
        for name, info in cls.model_fields.items():
            yield group, name, info


def aliases(info: FieldInfo) -> list[str]:
    """Further flags (without dashes in front) that mean the same setting."""
    extra = info.json_schema_extra
    return [str(alias) for alias in extra["aliases"]] if isinstance(extra, dict) else []  # type: ignore[union-attr]


def flag_name(field_name: str) -> str:
    """`http_port` to `http-port`."""
    return field_name.replace("_", "-")


def is_list(info: FieldInfo) -> bool:
    """Whether the setting takes several values."""
    return str(info.annotation).startswith("list[")


def canonical(flag: str) -> tuple[str, str]:
    """The (name, key) of a flag as typed: `--no-enable_lora` to (`enable-lora`, `enable-lora`).

    A dotted flag sets one entry of a JSON value: `--compilation-config.level` has the name `compilation-config`.
    """
    bare = flag.lstrip("-").split("=", 1)[0]
    head, dot, rest = bare.partition(".")
    name = head.replace("_", "-")
    name = name.removeprefix("no-")
    return name, name + dot + rest


def read_environment(environ: Mapping[str, str]) -> tuple[dict[str, dict[str, object]], dict[str, str], list[str]]:
    """Split `KSERVE_VLLM_*` variables into declared settings and engine flags.

    Variables that Kubernetes injects for Services whose name begins with `kserve-vllm` are passed over.

    Returns:
        group to {field: text}; engine flag name to text; the variables that were passed over.
    """
    known = {ENV_PREFIX + name.upper(): (group, name, info) for group, name, info in fields()}
    declared: dict[str, dict[str, object]] = {group: {} for group in GROUPS}
    engine: dict[str, str] = {}
    passed_over: list[str] = []
    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENV_PREFIX) or variable == ENV_PREFIX + "CONFIG":
            continue
        if variable in known and not _LINK_VALUE.match(text):
            group, name, info = known[variable]
            declared[group][name] = [part for part in text.split(",") if part] if is_list(info) else text
        elif _LINK_VALUE.match(text) or _LINK_SUFFIX.search(variable):
            passed_over.append(variable)
        else:
            engine[variable.removeprefix(ENV_PREFIX).lower().replace("_", "-")] = text
    return declared, engine, passed_over


_STANDARD = (
    ("server", "ssl_certfile", ("KSERVE_TLS_CERT_FILE",)),
    ("server", "ssl_keyfile", ("KSERVE_TLS_KEY_FILE",)),
    ("telemetry", "otlp_endpoint", ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")),
)
_OTLP_DEFAULT = "http://localhost:4317"


def standard_variables(environ: Mapping[str, str]) -> list[tuple[str, dict[str, dict[str, object]]]]:
    """Layers for `merge`, weakest of all, of variables that KServe or OpenTelemetry name and not we.

    KServe 0.21's model server falls back to `KSERVE_TLS_CERT_FILE` and `KSERVE_TLS_KEY_FILE`; its controller makes
    `OTEL_*` of `spec.tracing`. An empty OpenTelemetry variable counts as unset, as its specification has it.
    """
    layers: list[tuple[str, dict[str, dict[str, object]]]] = []
    for group, name, variables in _STANDARD:
        variable = next((each for each in variables if environ.get(each, "").strip()), None)
        if variable is not None and not (group == "telemetry" and traces_are_off(environ)):
            layers.append((f"variable {variable}", {group: {name: environ[variable].strip()}}))
    if "otlp" in trace_exporters(environ) and not traces_are_off(environ):
        layers.append(("variable OTEL_TRACES_EXPORTER", {"telemetry": {"otlp_endpoint": _OTLP_DEFAULT}}))
    return layers


def trace_exporters(environ: Mapping[str, str]) -> list[str]:
    """What `OTEL_TRACES_EXPORTER` names; empty where it is unset."""
    return [part.strip().lower() for part in environ.get("OTEL_TRACES_EXPORTER", "").split(",") if part.strip()]


def traces_are_off(environ: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's variables switch traces off, or send them elsewhere than to an OTLP receiver."""
    exporters = trace_exporters(environ)
    return environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or (
        bool(exporters) and "otlp" not in exporters and bool({"none", "console"} & set(exporters))
    )


def read_file(path: str | None) -> dict[str, dict[str, object]]:
    """Read the YAML file: a mapping of group to settings.

    Raises:
        ConfigError: the file can't be read, isn't such a mapping, or has an unknown group.
    """
    if path is None:
        return {}
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} can't be read: {error}") from error
    if tree is None:
        return {}
    allowed = [*GROUPS, "engine"]
    if not isinstance(tree, dict) or not all(isinstance(part, dict) for part in tree.values() if part is not None):
        raise ConfigError(f"--config {path} must hold a mapping of {', '.join(allowed)} to settings")
    for group in tree:
        if group not in allowed:
            raise ConfigError(f"--config {path}: unknown group {group!r}; the groups are {', '.join(allowed)}")
    return {group: {str(k): v for k, v in (part or {}).items()} for group, part in tree.items()}


def merge(layers: Sequence[tuple[str, Mapping[str, Mapping[str, object]]]]) -> tuple[dict[str, _Group], dict[str, str]]:
    """Merge layers of raw values, strongest first, into validated groups.

    Args:
        layers: (source, {group: {field: raw value}}). `{name}` in a source becomes the flag's name and `{env}` its
            variable's.

    Raises:
        ConfigError: an unknown field, or a value of the wrong type or out of range.
    """
    groups: dict[str, _Group] = {}
    sources: dict[str, str] = {}
    for group, cls in GROUPS.items():
        values: dict[str, object] = {}
        for source, tree in layers:
            for name, raw in tree.get(group, {}).items():
                key = name.replace("-", "_")
                if key in values:
                    continue
                values[key] = raw
                sources[f"{group}.{key}"] = source.format(name=flag_name(key), env=ENV_PREFIX + key.upper())
        try:
            groups[group] = cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(group, error, sources)) from None
        for name in cls.model_fields:
            sources.setdefault(f"{group}.{name}", "default")
    return groups, sources


def _explain(group: str, error: ValidationError, sources: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors(include_url=False, include_input=False):
        name = ".".join(str(part) for part in problem["loc"])
        top = str(problem["loc"][0]) if problem["loc"] else ""
        source = sources.get(f"{group}.{top}", "?")
        if problem["type"] == "extra_forbidden":
            lines.append(
                f"{group}.{name} (from {source}) is no setting of {group}; it has: "
                f"{', '.join(GROUPS[group].model_fields)}"
            )
        else:
            lines.append(f"{flag_name(top)} (from {source}): {problem['msg']}")
    return "; ".join(lines)


def expand_home(path: str) -> str:
    """A path with `~` and variables filled in."""
    return os.path.expandvars(os.path.expanduser(path))
