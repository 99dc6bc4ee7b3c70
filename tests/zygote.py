"""Servers for tests that are copies of a process which has imported what they import.

A server spends most of its start on importing PyTorch and vLLM, in the front end and once more in the process that
vLLM's own are copied from. One process a test run imports both (a zygote); each server is forked from it, and so is the
process that this server's engine and workers are copied from. What a server does after its imports is its own:
settings, environment, log, engine. Tests of a start itself, or of what is read while something is imported, take a
fresh interpreter (`tests.support.Server(..., fresh=True)`).

    python -m tests.zygote NAME     waits for requests on this abstract socket; `ForkedProcess` starts it
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence, Set
from multiprocessing import resource_tracker, util
from pathlib import Path
from typing import Any, NoReturn

_MOST_BYTES = 1 << 20
_UNUSED_S = 300.0
"""How long a zygote waits for somebody to ask."""
_THREADS = "/proc/self/task"
_IMPORTED = (
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.openai.chat_completion.serving",
    "vllm.entrypoints.openai.completion.serving",
    "vllm.entrypoints.openai.responses.serving",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "kserve_vllm.app.process",
    "kserve_vllm.kserve_sdk.model",
)


class ForkedProcess:
    """A server as `subprocess.Popen` would show it.

    Args:
        arguments: what stands behind `kserve-vllm`.
        env: all its variables.
        log: the descriptor that both outputs go to.
    """

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], log: int) -> None:
        self.args = list(arguments)
        self.returncode: int | None = None
        self._told, theirs = socket.socketpair()
        with theirs:
            request = json.dumps([self.args, dict(env), os.getcwd()]).encode()
            socket.send_fds(_zygote(), [request], [log, theirs.fileno()])
        self.pid = int(self._told.recv(64))

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit code, which is minus the number of a signal that ended it.

        Raises:
            subprocess.TimeoutExpired: it runs on after `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = int(self._told.recv(64))
            self._told.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, where it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def begin() -> None:
    """Start this test run's zygote, which imports from now on; only one of those that are started stays."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "tests.zygote", _address()]
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL)
    atexit.register(process.poll)  # which keeps it: nobody here waits for its end


def _address() -> str:
    """What the zygote of a test run listens on, which all processes of pytest-xdist have in common."""
    return f"kserve-vllm-tests-{os.environ.get('PYTEST_XDIST_TESTRUNUID') or os.getpid()}"


@functools.cache
def _zygote() -> socket.socket:
    """The connection to this test run's zygote, which ends with the last one."""
    for attempt in range(300):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_BYTES)
        try:
            connection.connect(f"\0{_address()}")
        except ConnectionRefusedError:
            connection.close()
            if attempt % 100 == 0:
                begin()
            time.sleep(0.1)
        else:
            return connection
    raise RuntimeError("no process that servers could be forked from has come up")


def main(address: str) -> None:
    """Import, then fork a server for each request until nobody is connected any more."""
    import setproctitle

    # It finds where the title stands only while the environment is as the kernel laid it.
    setproctitle.getproctitle()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        try:
            listener.bind(f"\0{address}")
        except OSError:
            return  # there is one
        listener.listen()
        _import()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        connections: list[socket.socket] = []
        within_s: float | None = _UNUSED_S
        while connections or within_s:
            ready = select.select([listener, *connections], [], [], within_s)[0]
            within_s = None
            for each in ready:
                if each is listener:
                    connections.append(listener.accept()[0])
                elif not _forks(each, [listener, *connections]):
                    connections.remove(each)
                    each.close()


def _forks(connection: socket.socket, others: Sequence[socket.socket]) -> bool:
    """Fork what is asked for; False where nobody asks any more."""
    text, fds, _, _ = socket.recv_fds(connection, _MOST_BYTES, 2)
    if text and os.fork() == 0:
        for each in others:
            each.close()
        _attend(text, *fds)
    for fd in fds:
        os.close(fd)
    return bool(text)


def _import() -> None:
    from kserve_vllm.engine import fork_server
    from kserve_vllm.engine.arguments import prepare_environment

    before = dict(os.environ)
    prepare_environment()
    os.environ.update(fork_server.ENVIRONMENT)
    for name in _IMPORTED:
        importlib.import_module(name)
    os.environ.clear()
    os.environ.update(before)
    gc.collect()
    gc.freeze()


def _attend(request: bytes, log: int, told: int) -> None:
    """In a process of its own: fork the server, tell its number, and its exit code when it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(told)
        _serve(request, log)
    os.close(log)
    os.write(told, str(pid).encode())
    # A test run that is killed closes its side; nothing of it is left behind.
    ended, closed = os.pidfd_open(pid), told
    if ended not in select.select([ended, closed], [], [])[0]:
        os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        os.write(told, str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _serve(request: bytes, log: int) -> None:
    """Look like a fresh process, and be the server."""
    import setproctitle

    arguments, env, folder = json.loads(request)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for output in (1, 2):
        os.dup2(log, output)
    os.close(log)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["kserve-vllm", *arguments]
    setproctitle.setproctitle(" ".join(["python", "-m", "kserve_vllm", *arguments]))
    tempfile.tempdir = None
    sys.path[1:1] = [each for each in env.get("PYTHONPATH", "").split(os.pathsep) if each not in {"", *sys.path}]
    _log_as_vllm_would()
    _fork_what_is_started()
    code = 1
    try:
        from kserve_vllm.cli import main as command

        code = command(arguments)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _log_as_vllm_would() -> None:
    """vLLM configures its loggers when it is imported, which follows on `logs.configure` in a fresh process."""
    import vllm.logger

    from kserve_vllm.telemetry import logs

    configure = logs.configure

    def configure_both(setting: str = "auto", access_log: bool = False) -> str:
        chosen = configure(setting, access_log)
        vllm.logger._configure_vllm_root_logger()
        return chosen

    logs.configure = configure_both


def _fork_what_is_started() -> None:
    """Fork what `multiprocessing` starts an interpreter for: the process that vLLM's are copied from, and front ends.

    Only while there is no thread, which a fork would lose and whose locks it would keep.
    """
    start: Any = util.spawnv_passfds

    def fork(path: bytes, args: Sequence[Any], passfds: Sequence[int]) -> int:
        words = [*map(os.fsdecode, args)]
        if "multiprocessing" not in words[-1] + words[-2] or "tracker" in words[-1] or len(os.listdir(_THREADS)) > 1:
            return int(start(path, args, passfds))
        return os.fork() or _be(words[words.index("-c") + 1 :], {*passfds})

    util.spawnv_passfds = fork


def _be(command: Sequence[str], kept: Set[int]) -> NoReturn:
    """Run what would stand behind `python -c`, with no more open than an interpreter that was started for it has."""
    from prometheus_client import values

    chosen: Any = values.get_value_class
    code = 1
    try:
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd not in kept:
                with contextlib.suppress(OSError):
                    os.close(fd)
        tracker: Any = resource_tracker._resource_tracker
        tracker._fd = tracker._pid = None
        # It looks once, when it is imported, whether several processes count.
        values.ValueClass = chosen()
        sys.argv = ["-c", *command[1:]]
        exec(command[0], {})
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
