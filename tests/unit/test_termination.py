"""The sentence that a container leaves for Kubernetes when it ends, and command lines that can't be one."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from kserve_vllm.app import process as bootstrap
from kserve_vllm.cli import command as cli
from kserve_vllm.config.settings import Settings
from kserve_vllm.core import termination
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.telemetry import logs


@pytest.fixture
def message(tmp_path: Path) -> Path:
    """The file as a kubelet makes it: there, and empty."""
    path = tmp_path / "termination-log"
    path.touch()
    return path


def test_the_first_sentence_stays_and_a_new_process_begins_anew(message: Path) -> None:
    termination.write(str(message), "the engine died")
    termination.write(str(message), "a front end ended with code 1")
    assert message.read_text() == "the engine died"
    termination.clear(str(message))
    termination.write(str(message), "x" * 5000)
    assert message.read_text() == "x" * 4096


def test_nothing_is_created_and_nothing_but_a_file_is_written_to(tmp_path: Path) -> None:
    absent, fifo = tmp_path / "absent", tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    for path in (absent, fifo, tmp_path, Path("/dev/null")):
        termination.clear(str(path))
        termination.write(str(path), "sentence")
    assert not absent.exists()
    assert os.read(reader, 100) == b""
    os.close(reader)


def test_an_exception_becomes_one_bounded_line() -> None:
    assert termination.describe(ValueError("two\n  lines")) == "ValueError: two lines"
    assert termination.describe(KeyError()) == "KeyError"
    assert len(termination.describe(ValueError("word " * 9000))) < 1000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--demo", "--http-port", "many"], "http-port"),
        (["--demo", "--http-port"], "expected one argument"),
        (["--demo", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--demo", "--no-such-engine-flag", "--http-port", "0", "--grpc-port", "0"], "no-such-engine-flag"),
        (["kserve-vllm", "serve", "--demo"], "entrypoint"),
        (["--headless", "--profile", "fastest"], "fastest"),
    ],
)
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_a_setting_that_cant_be_used_is_told_to_kubernetes(
    message: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
    by: str,
) -> None:
    if by == "flag":
        arguments = [*arguments, f"{termination.FLAG}={message}"]
    else:
        monkeypatch.setenv(termination.VARIABLE, str(message))
    if sentence == "no-such-engine-flag":
        # The engine's flags are read once the ports are open.
        monkeypatch.setattr(bootstrap, "run", lambda settings: _unknown_flag(settings))
    assert cli.main(["serve", *arguments]) == 2
    assert sentence in message.read_text()
    assert message.read_text() in capsys.readouterr().err


def _unknown_flag(settings: Settings) -> int:
    from kserve_vllm.engine.arguments import parse_engine_args

    parse_engine_args(settings.engine_argv())
    return 0


def test_an_exception_that_nobody_foresaw_is_told_too(message: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Settings) -> int:
        raise RuntimeError("no more threads")

    monkeypatch.setattr(bootstrap, "run", fail)
    with pytest.raises(RuntimeError):
        cli.main(["serve", "--demo", termination.FLAG, str(message)])
    assert message.read_text() == "kserve-vllm failed: RuntimeError: no more threads"


def test_a_clean_end_leaves_nothing(message: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message.write_text("of the process before")
    monkeypatch.setattr(bootstrap, "run", lambda _: 0)
    assert cli.main(["serve", "--demo", termination.FLAG, str(message)]) == 0
    assert message.read_text() == ""


@pytest.mark.parametrize(
    "words",
    [
        ["kserve-vllm", "serve", "--demo"],
        ["/opt/kserve-vllm/bin/kserve-vllm", "serve", "model"],
        ["serve", "--demo"],
        ["vllm", "serve", "model"],
        ["python3", "-m", "kserve_vllm", "serve", "--demo"],
        ["sh", "-c", "kserve-vllm serve --demo"],
        ["kserve-vllm serve --demo"],
        ["kserve-vllm"],
    ],
)
def test_a_command_in_place_of_arguments_is_explained(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="entrypoint is `kserve-vllm serve` already: leave the command out"):
        cli.resolve(words, {})


@pytest.mark.parametrize("words", [["health"], ["kserve-vllm", "keys", "list"], ["kserve-vllm config --demo"]])
def test_another_command_is_told_how_it_can_be_run(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="for another command set `command:"):
        cli.resolve(words, {})


def test_a_secret_among_such_arguments_is_not_shown() -> None:
    with pytest.raises(ConfigError) as refusal:
        cli.resolve(["kserve-vllm serve --api-key=hidden", "--hf-token", "hidden"], {})
    assert "hidden" not in str(refusal.value)


def test_a_folder_may_have_the_name_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "serve").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.resolve(["serve"], {}).model.model == "serve"
    assert cli.resolve(["Qwen/Qwen2.5-0.5B-Instruct"], {}).model.model == "Qwen/Qwen2.5-0.5B-Instruct"


def test_errors_of_vllms_processes_are_known_to_the_one_that_started_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", str(tmp_path / "logging.json"))
    assert logs.failures() == []
    handler = logs.Failures(str(tmp_path / "logging.json.failures"))
    logger = logging.Logger("vllm.v1.engine.core")
    logger.addHandler(handler)
    logger.error("no exception, no cause")
    for number in range(3000):
        try:
            raise MemoryError(f"number {number}")
        except MemoryError:
            logger.exception("EngineCore failed to start.")
    found = logs.failures()
    assert found[0] == ("EngineCore failed to start.", "MemoryError: number 0")
    assert 100 < len(found) < 3000, "the file grows without a bound"
    assert logs.cause() == "MemoryError: number 0"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (4, "was ended by SIGILL (an instruction that this processor"),
        (9, "was ended by SIGKILL (killed from outside"),
        (7, "was ended by SIGBUS (memory behind"),
        (17, "was ended by SIGCHLD"),
        (99, "was ended by signal 99"),
    ],
)
def test_the_signal_that_ended_a_worker_says_more_than_who_waited_for_it(
    number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: a worker died of SIGILL, and all that was left was the executor's "RuntimeError: cancelled"."""
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", str(tmp_path / "logging.json"))
    logger = logging.Logger("vllm.v1")
    logger.addHandler(logs.Failures(str(tmp_path / "logging.json.failures")))
    for error in ("before", "cancelled"):
        try:
            raise RuntimeError(error)
        except RuntimeError:
            logger.exception("EngineCore encountered a fatal error.")
        # As vLLM's executor says it: v1/executor/multiproc_executor.py
        logger.error("Worker proc %s died unexpectedly (exit code: %s), shutting down executor.", "VllmWorker-0", 1)
        logger.error(
            "Worker proc %s died unexpectedly (exit code: %s), shutting down executor.", "VllmWorker-0", -number
        )
    for cause in (logs.cause(), logs.cause(last=True)):
        assert cause is not None
        assert f"vLLM's process VllmWorker-0 {words}" in cause


def test_the_words_for_a_worker_that_died_are_vllms() -> None:
    spec = importlib.util.find_spec("vllm.v1.executor.multiproc_executor")
    assert spec is not None
    assert spec.origin is not None
    assert '"Worker proc %s died unexpectedly (exit code: %s), "' in Path(spec.origin).read_text()


def test_the_file_of_errors_is_removed_with_the_logging_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_LOGGING_CONFIG_PATH", raising=False)
    before: Any = logging.root.handlers[:], logging.root.level
    loggers = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    kept = [(each, each.propagate, each.level, each.handlers[:], each.disabled) for each in loggers]
    try:
        logs.configure("json")
        path = os.environ["VLLM_LOGGING_CONFIG_PATH"]
        Path(path + ".failures").touch()
        logs.forget()
        assert not os.path.exists(path)
        assert not os.path.exists(path + ".failures")
    finally:
        # Not by `monkeypatch`, which would put it back.
        os.environ.pop("VLLM_LOGGING_CONFIG_PATH", None)
        logging.root.handlers[:] = before[0]
        logging.root.setLevel(before[1])
        for logger, propagate, level, handlers, disabled in kept:
            logger.propagate, logger.level, logger.handlers, logger.disabled = propagate, level, handlers, disabled
