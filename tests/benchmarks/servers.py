"""The servers that are compared, started alike: the same engine flags, in the session of the load generator.

In one session, since the engine's processes busy-wait, and a client of another session then waits for the processor.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from kserve_vllm.config import demo
from kserve_vllm.config.settings import SHORTCUTS
from kserve_vllm.policy import tenants
from tests.support import end, free_port

MODEL = "demo"
_READY_WITHIN_S = 600.0
RUST_FOLDER = Path(__file__).resolve().parents[2] / ".tools" / "rust"
ENGINE_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
"""For every engine; the default cache takes half of the machine's memory."""


@dataclass(frozen=True)
class Configuration:
    """One server to measure.

    Attributes:
        name: for the tables.
        ours: our runtime, or `vllm serve`.
        arguments: further flags of its own.
        key: what a client sends as its key.
        env: further variables of its own.
        front_end: name of the process that takes requests, where that is not the one that is started.
    """

    name: str
    ours: bool
    arguments: Sequence[str] = ()
    key: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    front_end: str = ""

    def answers(self, mode: str) -> bool:
        """Whether this server answers requests of a mode."""
        return self.ours or not mode.startswith(("v2", "grpc"))


CONFIGURATIONS: dict[str, Configuration] = {
    "ours": Configuration("ours", ours=True),
    "vllm": Configuration("vllm", ours=False),
    "rust": Configuration("rust", ours=False, front_end="vllm-rs"),  # see `with_rust`
    "slow-path": Configuration("slow-path", ours=True, arguments=["--fast-path", "false", "--grpc-server", "grpcio"]),
    "policies": Configuration("policies", ours=True),  # see `with_policies`
}


# What a shortcut gives: ours over ours without it.
for _name in SHORTCUTS:
    _others = ",".join(other for other in SHORTCUTS if other != _name)
    CONFIGURATIONS[f"no-{_name}"] = Configuration(f"no-{_name}", ours=True, arguments=["--fast-path", _others])


def with_policies(folder: Path, collector: str) -> Configuration:
    """Ours with a key file, limits of the key, the tenant and the service, usage records, and traces at 1 %.

    Args:
        folder: for the key file and the usage records.
        collector: URL of an OpenTelemetry collector.
    """
    key = tenants.new_key()
    limits = {"requests_per_minute": 10**8, "tokens_per_minute": 10**10, "concurrent": 10**6}
    keys = folder / "keys.json"
    keys.write_text(
        json.dumps(
            {
                "tenants": {"bench": {"limits": limits}},
                "keys": [{"id": "bench", "tenant": "bench", "sha256": tenants.digest(key), "limits": limits}],
            }
        )
    )
    return Configuration(
        "policies",
        ours=True,
        key=key,
        arguments=[
            "--keys-file",
            str(keys),
            "--requests-per-minute",
            str(10**8),
            "--tokens-per-minute",
            str(10**10),
            "--usage-sink",
            f"file:{folder / 'usage.jsonl'}",
            "--otlp-endpoint",
            collector,
            "--trace-sample-ratio",
            "0.01",
        ],
    )


def with_rust(folder: Path = RUST_FOLDER) -> Configuration:
    """`vllm serve` with vLLM's front end in Rust. The CPU wheel has none: the binary of the CUDA wheel of the same
    version is taken, which is downloaded once (330 MB), as it needs no CUDA itself.

    Args:
        folder: where it is kept.
    """
    from vllm.version import __version__

    version = str(__version__).partition("+")[0]
    binary = folder / f"vllm-rs-{version}"
    if not binary.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as wheels:
            _output(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--no-deps",
                    "--only-binary",
                    ":all:",
                    "--dest",
                    wheels,
                    f"vllm=={version}",
                ]
            )
            with zipfile.ZipFile(next(Path(wheels).glob("*.whl"))) as wheel:
                name = next(each for each in wheel.namelist() if Path(each).name == "vllm-rs")
                whole = Path(wheels) / "vllm-rs"
                whole.write_bytes(wheel.read(name))
            whole.chmod(0o755)
            whole.rename(binary)
    return replace(CONFIGURATIONS["rust"], env={"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": str(binary)})


class Running:
    """A started server.

    Args:
        configuration: what to start.
        engine: engine flags, the same for all.
        instant: without an engine, see `instant_engine`.
    """

    def __init__(self, configuration: Configuration, engine: Sequence[str], instant: bool = False) -> None:
        self.configuration = configuration
        self.http_port, self.grpc_port = free_port(), free_port()
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"bench-{configuration.name}-", suffix=".log")  # noqa: SIM115
        flags = ["--model", str(demo.folder("model")), "--served-model-name", MODEL, "--host", "127.0.0.1", *engine]
        if configuration.ours:
            command = [
                "-m",
                "kserve_vllm",
                "serve",
                *flags,
                "--http-port",
                str(self.http_port),
                "--grpc-port",
                str(self.grpc_port),
                # Paused in the middle of a probe, the engine would count as hanging.
                "--engine-stall-timeout",
                "3600",
            ]
        else:
            model = flags.pop(1)
            flags.remove("--model")
            command = ["-m", "tests.benchmarks.vllm_command", "serve", model, *flags, "--port", str(self.http_port)]
        if instant:
            rest = command[command.index("serve") :]
            command = ["-m", "tests.benchmarks.instant_engine", "ours" if configuration.ours else "vllm", *rest]
        began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, *command, *configuration.arguments],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENGINE_ENV, **configuration.env},
        )
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.monotonic() - began

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _READY_WITHIN_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{self.log[-4000:]}")
            try:
                if httpx.get(f"http://127.0.0.1:{self.http_port}/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise RuntimeError(f"not ready within {_READY_WITHIN_S:g} s:\n{self.log[-4000:]}")

    @property
    def log(self) -> str:
        """What the server has written."""
        return Path(self._log.name).read_text(errors="replace")

    def cpu_s(self) -> float:
        """User and system time of the front-end process alone, in seconds."""
        process = psutil.Process(self.process.pid)
        if name := self.configuration.front_end:
            process = next(
                each for each in [process, *process.children(recursive=True)] if each.name().startswith(name)
            )
        times = process.cpu_times()
        return float(times.user + times.system)

    def memory_mib(self, peak: bool = False) -> float:
        """Resident memory of the front-end process in MiB, or its peak."""
        name = "VmHWM" if peak else "VmRSS"
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    def load(self, mode: str, concurrency: int, requests: int, **options: Any) -> dict[str, Any]:
        """Run `load.py` against this server; its figures with the front end's processor time per token."""
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.load",
            mode,
            "--concurrency",
            str(concurrency),
            "--requests",
            str(requests),
            "--http-port",
            str(self.http_port),
            "--grpc-port",
            str(self.grpc_port),
            "--model",
            MODEL,
            "--key",
            self.configuration.key,
        ]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        return self.measured(lambda: json.loads(_output(command)))

    def measured(self, work: Any) -> dict[str, Any]:
        """Run a load, and add the front end's processor time in microseconds per output token."""
        before = self.cpu_s()
        figures: dict[str, Any] = work()
        figures["cpu_us_per_token"] = 1e6 * (self.cpu_s() - before) / figures["tokens"]
        return figures

    def pause(self) -> None:
        """Stop the server's processes where they are. An engine without requests takes processor time too."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            for each in (process, *process.children(recursive=True)):
                each.send_signal(number)

    def stop(self) -> None:
        """End the server and whatever it started."""
        self.resume()
        end(self.process, 20)
        self._log.close()


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout
