"""The server is told to end while streams are open: directly, through nginx and through Envoy. None may be cut."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

from tests.compat.base import Case, Folder, Suite, Target, cases_of, start_script
from tests.compat.suites.clients import describe_v2
from tests.compat.suites.proxies import PROXIES, in_front

_PACKAGES = ("openai@7.55.0", "@grpc/grpc-js@1.14.7", "@grpc/proto-loader@0.8.1")
_WITHIN_S = 120.0


def _run(target: Target, folder: Path) -> list[Case]:
    assert target.pid is not None
    where = Folder(folder / "drain").node(*_PACKAGES)
    describe_v2(where)
    with contextlib.ExitStack() as stack:
        before = {"direct": target, **{name: stack.enter_context(in_front(name, target, folder)) for name in PROXIES}}
        clients = {name: start_script("drain.mjs", ["node"], each, where) for name, each in before.items()}
        for client in clients.values():
            assert client.stdout is not None
            client.stdout.readline()  # BEGUN, or the end of one that failed
        os.kill(target.pid, signal.SIGTERM)
        cases = []
        for name, client in clients.items():
            try:
                output, errors = client.communicate(timeout=_WITHIN_S)
            except subprocess.TimeoutExpired:
                client.kill()
                output, errors = client.communicate()
            cases += [
                replace(each, name=f"{name}: {each.name}") for each in cases_of(output, errors, client.returncode)
            ]
    return cases


SUITES = [
    Suite(
        "drain",
        "SIGTERM with streams open over HTTP and gRPC (GOAWAY): directly, through nginx, through Envoy",
        f"npm {', '.join(_PACKAGES[:2])}",
        _run,
        ends_server=True,
    )
]
