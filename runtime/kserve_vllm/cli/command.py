"""The `kserve-vllm` command: flags, variables and files to `Settings`. The only reader of `sys.argv`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, cast

from kserve_vllm.cli import terminal
from kserve_vllm.config import demo
from kserve_vllm.config import settings as tree
from kserve_vllm.config.profiles import PROFILES
from kserve_vllm.config.settings import (
    EngineFlag,
    LifecycleSettings,
    ModelSettings,
    PolicySettings,
    ServerSettings,
    Settings,
    TelemetrySettings,
    canonical,
    flag_name,
)
from kserve_vllm.core import termination
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops import operations

DEFAULT_MODEL_DIR = "/mnt/models"
_SECRET_FLAG = re.compile(r"(token|key|password|secret)$")

_SERVE_EPILOG = """
Every engine flag of `vllm serve` is taken too, and checked by vLLM's own parser:
  kserve-vllm serve Qwen/Qwen2.5-0.5B-Instruct --max-model-len 4096 --enable-prefix-caching
  kserve-vllm serve --help-engine lora     shows the engine flags with "lora" in their name

Each setting can also come from a variable (--http-port: KSERVE_VLLM_HTTP_PORT; --max-model-len:
KSERVE_VLLM_MAX_MODEL_LEN) or from a YAML file given with --config:
  model: {profile: low-latency}
  server: {http_port: 8000}
  engine: {max-model-len: 4096}
Flags win over variables, variables over the file, the file over the profile.

Try it without a GPU:
  kserve-vllm serve --demo
"""


_HEALTH_EPILOG = """
Examples:
  kserve-vllm health                       is it ready?
  kserve-vllm health --live --http-port 8000
  kserve-vllm health | jq -r .state        starting, loading, warming, ready, draining, stopped or failed

Exit codes: 0 yes, 1 no, or nothing answers.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 the engine failed, 2 a setting can't be used."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # kserve parses sys.argv when it is imported, and takes flags that begin like its own.
    sys.argv = sys.argv[:1]
    try:
        if arguments[:1] == ["serve"]:
            return _serve(arguments[1:])
        return terminal.printing(lambda: _dispatch(arguments))
    except ConfigError as error:
        print(f"kserve-vllm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _dispatch(arguments: list[str]) -> int:
    top = argparse.ArgumentParser(
        prog="kserve-vllm",
        description="Serve a language model on KServe: OpenAI, Open Inference Protocol V2 (REST, gRPC) and V1 from one "
        "vLLM engine.",
        epilog="Start with `kserve-vllm serve --demo`; `kserve-vllm COMMAND --help` explains each command. Exit codes "
        "of all: 0 done (or yes), 1 not (of serve: the engine failed), 2 an argument or setting can't be used, 130 "
        "after Ctrl-C, 141 where a pipe's reader has left; those of a command's own stand in its help. With --json, "
        "standard output has one document, also where a command fails: "
        '{"error": {"message", "exit_code"}}; progress and sentences for people go to standard error.',
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"kserve-vllm {version('kserve-vllm')}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("serve", help="load a model and serve it", add_help=False)
    commands.add_parser("config", help="print the effective settings and where each came from", add_help=False)
    health = commands.add_parser(
        "health",
        help="ask a server on this machine for its health, for exec probes",
        description="Ask a server on this machine for its health, over TLS where it speaks that, and print its answer.",
        epilog=_HEALTH_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    health.add_argument("--live", action="store_true", help="ask whether it is live instead of ready")
    health.add_argument("--ready", action="store_true", help="ask whether it is ready (the default)")
    health.add_argument(
        "--http-port", "--port", default=os.environ.get("KSERVE_VLLM_HTTP_PORT", "8080"), help="its HTTP port"
    )
    commands.add_parser("keys", help="make, hash and list API keys", add_help=False)
    commands.add_parser("profiles", help="print the profiles and the engine flags that each one sets")
    operations.register(commands)
    if arguments[:1] == ["config"]:
        return _print_config(arguments[1:])
    if arguments[:1] == ["keys"]:
        from kserve_vllm.cli import keys

        return keys.main(arguments[1:])
    if arguments[:1] and arguments[0] in operations.COMMANDS:
        return operations.run(arguments)
    args = top.parse_args(arguments)
    if args.command == "health":
        return _health("live" if args.live else "ready", args.http_port, os.environ)
    print(_profiles_table())
    return 0


def _health(kind: str, port: str, environ: Mapping[str, str]) -> int:
    """Print the health of the server on this machine; 0 where the answer is yes, else 1.

    Over TLS where the variables name a certificate, or where nothing answers in plain HTTP but something listens: a
    server may have its certificate from a flag. It is not verified: it bears the service's name and not this machine's,
    and nothing is said to the server.
    """
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    secure = any(environ.get(name) for name in (f"{tree.ENV_PREFIX}SSL_CERTFILE", "KSERVE_TLS_CERT_FILE"))
    failure = ""
    for scheme in ("https", "http") if secure else ("http", "https"):
        url = f"{scheme}://127.0.0.1:{port}/v2/health/{kind}"
        # The proxies of the environment are not for this machine.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unverified)
        )
        try:
            with opener.open(url, timeout=4) as response:
                print(response.read().decode())
                return 0
        except urllib.error.HTTPError as error:
            print(error.read().decode())
            return 1
        except (OSError, http.client.HTTPException) as error:
            failure = failure or f"nothing answers at {url}: {error}"
            if isinstance(error, TimeoutError) or isinstance(
                getattr(error, "reason", error), (ConnectionRefusedError, TimeoutError)
            ):
                break
    print(failure)
    return 1


def _serve(arguments: list[str]) -> int:
    if "--help-engine" in arguments:
        at = arguments.index("--help-engine")
        return _help_engine(arguments[at + 1] if at + 1 < len(arguments) else "all")
    path = termination.path_of(arguments, os.environ)
    termination.clear(path)
    try:
        return _run(arguments)
    except ConfigError as error:
        termination.write(path, f"kserve-vllm: {error}")
        raise
    except Exception as error:
        termination.write(path, f"kserve-vllm failed: {termination.describe(error)}")
        raise


def _run(arguments: list[str]) -> int:
    if "--headless" in arguments:
        return _serve_headless([word for word in arguments if word != "--headless"])
    settings = resolve(arguments, os.environ)
    if settings.server.api_server_count > 1:
        from kserve_vllm.app import supervisor

        return supervisor.run(settings)
    from kserve_vllm.app import process as bootstrap

    return bootstrap.run(settings)


def _serve_headless(arguments: list[str]) -> int:
    """Run only workers, for the ranks above 0 of a multi-node deployment: nothing listens for clients."""
    settings = resolve(arguments, os.environ)
    from kserve_vllm.engine.arguments import parse_engine_args, run_headless
    from kserve_vllm.telemetry import logs

    logs.configure(settings.telemetry.log_format)
    try:
        run_headless(parse_engine_args(settings.engine_argv()))
    finally:
        logs.forget()
    return 0


def _help_engine(keyword: str) -> int:
    from kserve_vllm.engine.arguments import engine_help

    print(engine_help(keyword))
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse's, raising instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See {self.prog} --help")


def serve_parser(prog: str = "kserve-vllm serve") -> argparse.ArgumentParser:
    """The parser of the runtime's own flags; engine flags are left over by it."""
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [MODEL] [options] [engine flags]",
        description="Load a model and serve it over OpenAI's API, V2 REST and gRPC, and V1.",
        epilog=_SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings (see below)")
    sections = {group: parser.add_argument_group(group) for group in tree.GROUPS}
    for group, name, info in tree.fields():
        spellings = [f"--{flag_name(name)}", *(f"--{alias}" for alias in tree.aliases(info))]
        options: dict[str, Any] = {"dest": f"{group}.{name}", "default": argparse.SUPPRESS}
        default = "" if info.default in (None, []) or info.default_factory else f" (default: {info.default})"
        options["help"] = (info.description or "").replace("%", "%%") + default
        if info.annotation is bool:
            options |= {"nargs": "?", "const": "true", "metavar": "BOOL"}
        elif tree.is_list(info):
            # Alone, `--fast-path` means what it has always meant.
            several = "*" if name == "fast_path" else "+"
            options |= {"action": "extend", "nargs": several, "metavar": name.upper()}
        else:
            options["metavar"] = name.upper()
        sections[group].add_argument(*spellings, **options)
    return parser


def resolve(arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Merge flags, variables, file, profile and defaults.

    Engine flags are collected, not yet checked: that takes vLLM's parser, which takes seconds to import.

    Raises:
        ConfigError: a value of the runtime's own settings can't be used, or no model is given.
    """
    words = [_dashes(word) for word in arguments]
    _refuse_a_command(words)
    positional, words = (words[0], words[1:]) if words and not words[0].startswith("-") else (None, words)
    namespace, leftover = serve_parser().parse_known_args(words)
    given = vars(namespace)
    file = given.pop("config", None) or environ.get(tree.ENV_PREFIX + "CONFIG")

    flags: dict[str, dict[str, object]] = {group: {} for group in tree.GROUPS}
    for dest, value in given.items():
        group, name = dest.split(".")
        flags[group][name] = value
    if positional is not None:
        if flags["model"].get("model", positional) != positional:
            raise ConfigError(f"two models are given: {positional} and --model {flags['model']['model']}")
        flags["model"]["model"] = positional

    from_env, engine_env, _ = tree.read_environment(environ)
    from_file = tree.read_file(file)
    if key := environ.get("VLLM_API_KEY"):
        from_env["server"].setdefault("api_key", [key])
    groups, sources = tree.merge(
        [
            ("flag --{name}", flags),
            ("variable {env}", from_env),
            (f"file {file}", {g: v for g, v in from_file.items() if g != "engine"}),
            *tree.standard_variables(environ),
        ]
    )
    _check_tls(cast(ServerSettings, groups["server"]), sources)
    _check_bounds(cast(ServerSettings, groups["server"]), sources)
    model = cast(ModelSettings, groups["model"])
    if model.profile not in PROFILES:
        raise ConfigError(
            f"profile (from {sources['model.profile']}): {model.profile!r} is none of {', '.join(PROFILES)}"
        )
    path, path_source = _model_path(model, sources)
    names = model.model_name or _default_names(model, path)
    policy = cast(PolicySettings, groups["policy"])
    server = cast(ServerSettings, groups["server"])
    if model.demo and sources["server.ui"] == "default":
        server, sources["server.ui"] = server.model_copy(update={"ui": True}), "demo model"
    engine = _engine_flags(
        leftover, engine_env, from_file.get("engine", {}), file, model, policy, path, path_source, names
    )
    settings = Settings(
        model=model.model_copy(update={"model_name": names}),
        server=server,
        lifecycle=cast(LifecycleSettings, groups["lifecycle"]),
        telemetry=cast(TelemetrySettings, groups["telemetry"]),
        policy=policy,
        engine=engine,
        sources=sources,
    )
    tree.check_variables(settings, environ)
    if settings.server.api_server_count > 1:
        tree.check_front_ends(settings, environ)
    return settings


def _check_tls(server: ServerSettings, sources: Mapping[str, str]) -> None:
    """Refuse a private key whose certificate is not named: the ports would be open without TLS.

    Raises:
        ConfigError: it is so.
    """
    if server.ssl_keyfile and not server.ssl_certfile:
        raise ConfigError(
            f"ssl-keyfile (from {sources['server.ssl_keyfile']}) is given without --ssl-certfile, so there would be no "
            "TLS. Give both, or neither"
        )


def _check_bounds(server: ServerSettings, sources: Mapping[str, str]) -> None:
    """Refuse a bound on JSON that the bound on all bodies leaves without an effect.

    Raises:
        ConfigError: it was asked for, and is above the other.
    """
    if sources["server.max_json_mib"] != "default" and server.max_json_mib > server.max_body_mib:
        raise ConfigError(
            f"max-json-mib (from {sources['server.max_json_mib']}): {server.max_json_mib} is above "
            f"--max-body-mib, which is {server.max_body_mib} (from {sources['server.max_body_mib']}) and holds for "
            "JSON as well. Lower the one, or raise the other"
        )


_COMMANDS = frozenset({"serve", "config", "health", "keys", "profiles"})
_PROGRAMS = frozenset({"kserve-vllm", "kserve_vllm", "vllm", "python", "python3", "sh", "bash", "env", "exec"})


def _refuse_a_command(words: Sequence[str]) -> None:
    """Refuse a whole command where flags are expected: `kserve-vllm serve` is the image's entrypoint already.

    Raises:
        ConfigError: the first argument is a command and no model.
    """
    # A shell's command line may have come as one word.
    parts = [part for word in words[:1] for part in word.split()] + list(words[1:])
    names = [part.rsplit("/", 1)[-1] for part in parts]
    if not names or names[0] not in _COMMANDS | _PROGRAMS or Path(words[0]).is_dir():
        return
    at = 0
    while at < len(names) and names[at] in _PROGRAMS | {"-m", "-c", "-lc"}:
        at += 1
    # After a shell's `-c` the rest is one word again.
    command = next(iter((names[at] if at < len(names) else "serve").split()), "serve")
    if command in _COMMANDS - {"serve"}:
        advice = f'for another command set `command: ["kserve-vllm", "{command}"]` (Docker: --entrypoint kserve-vllm)'
    else:
        advice = "leave the command out and begin with the model or a flag, such as --model=/mnt/models"
    raise ConfigError(
        f"{parts[0]!r} stands where a model or a flag is expected. The image's entrypoint is `kserve-vllm serve` "
        f"already: {advice}"
    )


def check_serve_args(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
    """Check an argument list of `kserve-vllm serve` without starting anything.

    Raises:
        ConfigError: a flag that neither the runtime nor vLLM knows, or a value that can't be used.
    """
    from kserve_vllm.engine.arguments import parse_engine_args

    words = [word for word in argv if word != "--headless"]
    parse_engine_args(resolve(words, environ or {}).engine_argv())


def _dashes(word: str) -> str:
    """`--http_port=1` to `--http-port=1`; values are left alone."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    head, dot, rest = name.partition(".")
    return head.replace("_", "-") + dot + rest + equals + value


def _model_path(model: ModelSettings, sources: Mapping[str, str]) -> tuple[str, str]:
    wanted = {
        key: value
        for key, value in (
            ("model", model.model),
            ("model_dir", model.model_dir),
            ("demo", str(demo.folder()) if model.demo else None),
        )
        if value
    }
    if len(set(wanted.values())) > 1:
        raise ConfigError(
            "more than one model is given: " + ", ".join(f"{key} (from {sources[f'model.{key}']})" for key in wanted)
        )
    for key, value in wanted.items():
        return tree.expand_home(value), sources[f"model.{key}"]
    if Path(DEFAULT_MODEL_DIR).is_dir():
        return DEFAULT_MODEL_DIR, f"default: {DEFAULT_MODEL_DIR} exists"
    raise ConfigError(
        "no model is given. Name one (kserve-vllm serve Qwen/Qwen2.5-0.5B-Instruct, or a folder), mount one at "
        f"{DEFAULT_MODEL_DIR}, or try --demo"
    )


def _default_names(model: ModelSettings, path: str) -> list[str]:
    if model.demo:
        return [demo.NAME]
    last = path.rstrip("/").rsplit("/", 1)[-1]
    return [last] if path.startswith((".", "/")) or last == path else [path, last]


def _engine_flags(
    leftover: Sequence[str],
    environ: Mapping[str, str],
    file_part: Mapping[str, object],
    file: str | None,
    model: ModelSettings,
    policy: PolicySettings,
    path: str,
    path_source: str,
    names: Sequence[str],
) -> tuple[EngineFlag, ...]:
    """All engine flags, weakest source first, each key from its strongest source alone."""
    layers: list[list[EngineFlag]] = [list(_split_words(leftover))]
    layers.append(
        [
            _from_value(name, text, f"variable {tree.ENV_PREFIX}{name.upper().replace('-', '_')}")
            for name, text in environ.items()
        ]
    )
    layers.append([_from_value(name, value, f"file {file}") for name, value in file_part.items()])
    if policy.keys_file or policy.max_concurrent:
        # Classes of requests mean something to the engine's own queue too.
        layers.append([_from_value("scheduling-policy", "priority", "classes of requests")])
    if model.demo:
        layers.append([_from_value(name, value, "demo model") for name, value in demo.engine_flags().items()])
    layers.append(
        [_from_value(name, value, f"profile {model.profile}") for name, value in PROFILES[model.profile].flags.items()]
    )
    if model.adapters_file:
        layers.append(_adapter_flags(layers))
    layers.append(
        [
            EngineFlag("model", "model", ("--model", path), path_source),
            EngineFlag("served-model-name", "served-model-name", ("--served-model-name", *names), "model name"),
        ]
    )
    chosen: list[EngineFlag] = []
    taken: set[str] = set()
    for layer in layers:
        chosen = [flag for flag in layer if flag.key not in taken] + chosen
        taken |= {flag.key for flag in layer}
    return tuple(chosen)


def _adapter_flags(layers: Sequence[Sequence[EngineFlag]]) -> list[EngineFlag]:
    """What an adapters file switches on, where nothing else says it.

    Raises:
        ConfigError: LoRA is switched off.
    """
    given = {flag.key: flag for layer in reversed(layers) for flag in layer}
    lora = given.get("enable-lora")
    if lora is not None and lora.tokens[0].startswith("--no-"):
        raise ConfigError(f"--adapters-file is given, and {lora.tokens[0]} (from {lora.source}) switches adapters off")
    wanted: dict[str, object] = {"enable-lora": True}
    if "max-loras" not in given:
        # vLLM's 1 would run one adapter at a time and read the next one from disk in between.
        wanted |= {"max-loras": "4", "max-cpu-loras": "32"}
    return [_from_value(name, value, "adapters file") for name, value in wanted.items()]


def _split_words(words: Sequence[str]) -> Iterable[EngineFlag]:
    """Group leftover words into flags with their values. A word that starts with a dash begins a new flag, unless it
    is a negative number."""
    group: list[str] = []
    for word in [*words, "--"]:
        begins = word.startswith("-") and not _is_number(word)
        if begins and group:
            name, key = canonical(group[0])
            yield EngineFlag(name, key, tuple(group), f"flag {group[0].split('=', 1)[0]}")
            group = []
        if not begins and not group:
            raise ConfigError(f"{word!r} stands where a flag is expected; only one model can be named")
        group.append(word)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _from_value(name: str, value: object, source: str) -> EngineFlag:
    canonical_name, key = canonical(name)
    flag = f"--{flag_name(key)}" if key == canonical_name else f"--{key}"
    text = value.strip().lower() if isinstance(value, str) else value
    if text is True or text == "true":
        tokens: tuple[str, ...] = (flag,)
    elif text is False or text == "false":
        tokens = (f"--no-{canonical_name}",)
    elif isinstance(value, dict):
        tokens = (flag, json.dumps(value))
    elif isinstance(value, list):
        tokens = (flag, *(part if isinstance(part, str) else json.dumps(part) for part in value))
    else:
        tokens = (f"{flag}={value}",)
    return EngineFlag(canonical_name, key, tokens, source)


def _profiles_table() -> str:
    lines = []
    for name, profile in PROFILES.items():
        lines.append(f"{name}: {profile.summary}")
        lines += [f"    --{flag}" + ("" if value is True else f" {value}") for flag, value in profile.flags.items()]
    return "\n".join(lines)


def _print_config(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(
            "usage: kserve-vllm config [the arguments of serve]\n\n"
            "Print the effective settings as YAML, each with where it came from. Nothing is started. Engine flags "
            "are checked by vLLM's parser."
        )
        return 0
    from kserve_vllm.engine.arguments import parse_engine_args

    settings = resolve(arguments, os.environ)
    parse_engine_args(settings.engine_argv())
    print(render_config(settings))
    return 0


def render_config(settings: Settings) -> str:
    """The effective settings as YAML with a comment per value that says where it came from; secrets hidden."""
    lines = []
    for group in tree.GROUPS:
        lines.append(f"{group}:")
        for name, value in getattr(settings, group).model_dump(mode="json").items():
            lines.append(f"  {name}: {json.dumps(value)}  # {settings.sources[f'{group}.{name}']}")
    lines.append("engine:")
    for flag in settings.engine:
        first, *values = flag.tokens
        _, equals, inline = first.partition("=")
        values = [inline, *values] if equals else values
        shown: object = not first.startswith("--no-") if not values else values[0] if len(values) == 1 else values
        if _SECRET_FLAG.search(flag.key):
            shown = "**********"
        lines.append(f"  {flag.key}: {json.dumps(shown)}  # {flag.source}")
    return "\n".join(lines)
