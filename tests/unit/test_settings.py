"""Where settings come from, which source wins, and what is refused."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kserve_vllm.cli import command as cli
from kserve_vllm.config.profiles import PROFILES
from kserve_vllm.config.settings import Settings
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.engine import arguments as engine_arguments
from kserve_vllm.engine.arguments import look_for_folders, parse_engine_args

Resolve = Callable[..., Settings]


def engine(settings: Settings) -> dict[str, str]:
    """Engine flags by key, as YAML shows them."""
    return dict(yaml.safe_load(cli.render_config(settings))["engine"])


def test_a_flag_wins_over_a_variable_over_the_file_over_the_profile(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "server: {http_port: 1003, grpc_port: 1003, max_batch: 3}\n"
        "engine: {max-num-seqs: 3, max-model-len: 3, max-num-batched-tokens: 3}\n"
    )
    environ = {
        "KSERVE_VLLM_HTTP_PORT": "1002",
        "KSERVE_VLLM_GRPC_PORT": "1002",
        "KSERVE_VLLM_MAX_NUM_SEQS": "2",
        "KSERVE_VLLM_MAX_MODEL_LEN": "2",
    }
    settings = cli.resolve(["some/model", "--http-port", "1001", "--max-num-seqs", "1", "--config", str(file)], environ)
    assert (settings.server.http_port, settings.server.grpc_port, settings.server.max_batch) == (1001, 1002, 3)
    flags = engine(settings)
    assert (flags["max-num-seqs"], flags["max-model-len"], flags["max-num-batched-tokens"]) == ("1", "2", "3")
    assert flags["enable-prefix-caching"] is True, "the profile's other flags stay"
    sources = settings.sources
    assert sources["server.http_port"] == "flag --http-port"
    assert sources["server.grpc_port"] == "variable KSERVE_VLLM_GRPC_PORT"
    assert sources["server.max_batch"] == f"file {file}"
    assert sources["server.host"] == "default"


def test_the_merged_flags_reach_vllms_parser(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("engine: {compilation-config: {mode: 0}, enforce-eager: true, max-logprobs: 7}\n")
    arguments = ["/some/model", "--config", str(file), "--no-enable-prefix-caching", "--max_model_len=1k"]
    args = parse_engine_args(cli.resolve(arguments, {"KSERVE_VLLM_SEED": "5"}).engine_argv())
    assert args.model == "/some/model"
    assert args.served_model_name == ["model"]
    assert (args.max_model_len, args.seed, args.max_logprobs) == (1000, 5, 7)
    assert args.enforce_eager is True
    assert args.enable_prefix_caching is False
    assert args.max_num_seqs == PROFILES["balanced"].flags["max-num-seqs"]


@pytest.mark.parametrize("able", [False, True])
def test_the_demo_model_is_in_float32_where_bfloat16_is_slow(monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    def dtype(*arguments: str) -> str:
        args = parse_engine_args(cli.resolve([*arguments], {}).engine_argv())
        engine_arguments.look_at_bfloat16(args)
        return str(args.dtype)

    monkeypatch.setattr(engine_arguments, "has_bfloat16", lambda: able)
    assert dtype("--demo") == ("auto" if able else "float32")
    assert dtype("--demo", "--dtype", "bfloat16") == "bfloat16"
    assert dtype("some/model") == "auto"


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_taken_by_vllms_parser_and_every_flag_of_it_can_be_overridden(name: str) -> None:
    args = parse_engine_args(cli.resolve(["m", "--profile", name], {}).engine_argv())
    for flag, value in PROFILES[name].flags.items():
        assert getattr(args, flag.replace("-", "_")) == value
    args = parse_engine_args(cli.resolve(["m", "--profile", name, "--max-num-seqs", "3"], {}).engine_argv())
    assert args.max_num_seqs == 3


def test_kserves_spellings_work(tmp_path: Path) -> None:
    settings = cli.resolve(
        ["--model_name", "iris", "--model_dir", str(tmp_path), "--http_port", "9000", "--grpc_port=9001"], {}
    )
    assert settings.model.model_name == ["iris"]
    assert (settings.server.http_port, settings.server.grpc_port) == (9000, 9001)
    assert engine(settings)["model"] == str(tmp_path)


def test_mnt_models_is_the_default_model_where_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "DEFAULT_MODEL_DIR", str(tmp_path))
    settings = cli.resolve([], {})
    assert engine(settings)["model"] == str(tmp_path)
    monkeypatch.setattr(cli, "DEFAULT_MODEL_DIR", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"no model is given.*--demo"):
        cli.resolve([], {})


def test_a_hub_id_is_served_under_its_name_and_the_last_part_of_it() -> None:
    assert cli.resolve(["Qwen/Qwen2.5-0.5B-Instruct"], {}).model.model_name == [
        "Qwen/Qwen2.5-0.5B-Instruct",
        "Qwen2.5-0.5B-Instruct",
    ]


def test_two_different_models_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"more than one model is given: model .*model_dir"):
        cli.resolve(["--model", "a/b", "--model_dir", "/c"], {})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["m", "--max-num-seq", "4"], "unknown flag --max-num-seq; nearest: --max-num-seqs"),
        (["m", "--drain-timeouts", "4"], "unknown flag --drain-timeouts; nearest: --drain-timeout"),
        (["m", "--max-model-len", "many"], "vLLM does not take this: argument --max-model-len"),
        (["m", "--uds", "/x"], "--uds is a flag of vLLM's own server"),
        (["m", "--no-enable-ssl-refresh"], "is a flag of vLLM's own server"),
        (["m", "--enable-auto-tool-choice"], "requires --tool-call-parser"),
        (["m", "n"], "'n' stands where a flag is expected"),
        (["m", "--http-port", "70000"], r"http-port \(from flag --http-port\): .*less than or equal to 65535"),
        (["m", "--http-port", "x"], r"http-port \(from flag --http-port\): .*integer"),
        (["m", "--profile", "fast"], "'fast' is none of balanced"),
        (["m", "--config", "/does/not/exist"], "--config /does/not/exist can't be read"),
    ],
)
def test_what_can_not_be_used_is_refused_with_a_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        cli.check_serve_args(arguments)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "servers: {http_port: 1}",
            "unknown group 'servers'; the groups are .* lifecycle, telemetry, policy, engine",
        ),
        ("server: {htp_port: 1}", "server.htp_port .* is no setting of server"),
        ("[1]", "must hold a mapping"),
        ("server: {http_port: [", "can't be read"),
        ("engine: {max-model-length: 5}", "unknown flag --max-model-length; nearest: --max-model-len"),
    ],
)
def test_a_wrong_file_is_refused_with_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        cli.check_serve_args(["m", "--config", str(file)])


def test_an_unknown_variable_is_refused_and_what_kubernetes_injects_is_passed_over() -> None:
    injected = {
        "KSERVE_VLLM_PORT": "tcp://10.0.0.1:80",
        "KSERVE_VLLM_SERVICE_HOST": "10.0.0.1",
        "KSERVE_VLLM_SERVICE_PORT_HTTP": "80",
        "KSERVE_VLLM_HTTP_PORT": "tcp://10.0.0.1:80",
        "KSERVE_VLLM_CHAT_PORT_8080_TCP_ADDR": "10.0.0.1",
        "KSERVE_VLLM_CHAT_SERVICE_PORT": "80",
    }
    cli.check_serve_args(["m"], injected)
    assert cli.resolve(["m"], injected).server.http_port == 8080
    assert engine(cli.resolve(["m"], {"KSERVE_VLLM_MASTER_PORT": "29501"}))["master-port"] == "29501"
    with pytest.raises(ConfigError, match="unknown flag --max-model-lenght; nearest: --max-model-len"):
        cli.check_serve_args(["m"], {"KSERVE_VLLM_MAX_MODEL_LENGHT": "5"})


@pytest.mark.parametrize(
    ("arguments", "variable"),
    [
        (["--keys-file", "k.yaml"], "VLLM_ENABLE_RESPONSES_API_STORE"),
        (["--tokens-per-minute", "9"], "VLLM_ENABLE_RESPONSES_API_STORE"),
        (["--max-concurrent", "9"], "VLLM_ENABLE_RESPONSES_API_STORE"),
        (["--response-cache", "memory"], "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (["--response-cache", "memory"], "VLLM_SERVER_DEV_MODE"),
    ],
)
def test_a_switch_of_vllms_that_gets_around_a_policy_is_refused(arguments: list[str], variable: str) -> None:
    with pytest.raises(ConfigError, match=f"{arguments[0]} and the variable {variable}"):
        cli.resolve(["m", *arguments], {variable: "1"})
    cli.resolve(["m", *arguments], {variable: "0"})
    cli.resolve(["m"], {variable: "1"})


def test_a_bound_on_json_above_that_on_all_bodies_would_do_nothing_and_is_refused() -> None:
    sentence = r"max-json-mib \(from flag --max-json-mib\): 30 is above --max-body-mib, which is 8 \(from flag"
    with pytest.raises(ConfigError, match=sentence):
        cli.resolve(["m", "--max-json-mib", "30", "--max-body-mib", "8"], {})
    with pytest.raises(ConfigError, match=r"65 is above --max-body-mib, which is 64 \(from default"):
        cli.resolve(["m"], {"KSERVE_VLLM_MAX_JSON_MIB": "65"})
    assert cli.resolve(["m", "--max-json-mib", "64"], {}).server.max_json_mib == 64
    assert cli.resolve(["m", "--max-body-mib", "8"], {}).server.max_body_mib == 8


def test_trust_remote_code_is_off_unless_asked_for() -> None:
    assert parse_engine_args(cli.resolve(["m"], {}).engine_argv()).trust_remote_code is False
    assert parse_engine_args(cli.resolve(["m", "--trust-remote-code"], {}).engine_argv()).trust_remote_code is True


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "kserve_vllm", *arguments], capture_output=True, text=True, check=False
    )


Said = tuple[int, str, str]


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Runs a command that starts nothing in this process, which has vLLM's flags read already: code, stdout, stderr."""

    def run(*arguments: str, **env: str) -> Said:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["kserve-vllm"])
        try:
            code = cli.main(arguments)
        except SystemExit as end:  # as argparse ends after `--help`
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_config_prints_values_and_sources_and_hides_secrets(says: Callable[..., Said]) -> None:
    code, out, err = says(
        *("config", "m", "--api-key", "s3cret", "--hf-token", "t0ken", "--redis-url", "redis://u:s3cret@host"),
        *("--usage-sink", "http://u:s3cret@host/"),
        KSERVE_VLLM_MAX_BATCH="9",
    )
    assert code == 0, err
    tree = yaml.safe_load(out)
    assert tree["server"]["max_batch"] == 9
    assert "  max_batch: 9  # variable KSERVE_VLLM_MAX_BATCH" in out
    assert "s3cret" not in out + err
    assert "t0ken" not in out + err


@pytest.mark.integration
def test_a_setting_that_can_not_be_used_ends_the_command_with_code_2_and_one_line() -> None:
    done = command("serve", "m", "--max-num-seq", "4")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("kserve-vllm: unknown flag --max-num-seq; nearest: --max-num-seqs")
    assert "Traceback" not in done.stderr


def test_help_teaches_each_command(says: Callable[..., Said]) -> None:
    assert "serve --demo" in says("--help")[1]
    text = says("serve", "--help")[1]
    assert "--drain-timeout" in text
    assert "KSERVE_VLLM_MAX_MODEL_LEN" in text
    assert "--max-lora-rank" in says("serve", "--help-engine", "lora")[1]
    assert "long-context" in says("profiles")[1]
    assert "Nothing is started" in says("config", "--help")[1]


def test_health_says_that_nothing_answers() -> None:
    done = command("health", "--http-port", "1")
    assert done.returncode == 1
    assert "nothing answers at http://127.0.0.1:1/v2/health/ready" in done.stdout


def standard(**variables: str) -> Settings:
    """Settings with these variables alone."""
    return cli.resolve(["some/model"], variables)


def test_kserves_tls_variables_are_taken_where_nothing_else_names_the_files() -> None:
    given = {"KSERVE_TLS_CERT_FILE": "/tls/tls.crt", "KSERVE_TLS_KEY_FILE": "/tls/tls.key"}
    found = standard(**given)
    assert (found.server.ssl_certfile, found.server.ssl_keyfile) == ("/tls/tls.crt", "/tls/tls.key")
    assert found.sources["server.ssl_certfile"] == "variable KSERVE_TLS_CERT_FILE"
    found = standard(**given, KSERVE_VLLM_SSL_CERTFILE="/own.crt")
    assert found.server.ssl_certfile == "/own.crt"
    with pytest.raises(ConfigError, match=r"variable KSERVE_TLS_KEY_FILE\) is given without --ssl-certfile"):
        standard(KSERVE_TLS_KEY_FILE="/tls/tls.key")


@pytest.mark.parametrize(
    ("variables", "endpoint"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}, "http://collector:4317"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b:2"},
            "http://b:2",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_TRACES_EXPORTER": "console"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_TRACES_EXPORTER": "console,otlp"}, "http://a:1"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_TRACES_EXPORTER": "zipkin"}, "http://a:1"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, None),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "http://localhost:4317"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "KSERVE_VLLM_OTLP_ENDPOINT": "http://own:1"}, "http://own:1"),
    ],
)
def test_opentelemetrys_variables_name_the_collector_where_nothing_else_does(
    variables: dict[str, str], endpoint: str | None
) -> None:
    assert standard(**variables).telemetry.otlp_endpoint == endpoint


def test_the_page_is_on_with_the_demo_alone() -> None:
    rows = ((["--demo"], True), (["--demo", "--ui", "false"], False), (["org/m"], False), (["org/m", "--ui"], True))
    for arguments, wanted in rows:
        assert cli.resolve(arguments, {}).server.ui is wanted, arguments


@pytest.mark.parametrize("flag", ["model", "tokenizer"])
def test_a_path_that_leads_nowhere_is_told_as_one_and_a_name_of_the_hub_is_not(flag: str, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(ConfigError, match=f"^--{flag} {absent}: there is no such file or folder here"):
        look_for_folders(argparse.Namespace(**{flag: str(absent)}))
    for fine in (str(tmp_path), "owner/name", "s3://bucket/model", None):
        look_for_folders(argparse.Namespace(**{flag: fine}))
