"""Run a load against the demo model under a real Prometheus, and draw the dashboards for the README. Not a test.

Usage: python -m tests.observability.draw_load_run FOLDER [SECONDS]

The load goes up and down, through every protocol, and ends with more streams than the engine takes at once.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.observability.load import LONG, Client
from tests.observability.prom import Prometheus
from tests.observability.test_rules import RULES
from tests.support import DEMO, ROOT, Server
from tests.tools import install_prometheus

_KEY = "key"
_LONG = "Many prompts begin with the same long words, as those of an application do. " * 6


def worker(client: Client, until: float, number: int) -> None:
    """Ask one thing after the other until the time is over."""
    asks = [client.chat_stream, client.infer, client.generate, client.predict, client.grpc_infer, client.chat]
    turn = number
    while time.time() < until:
        turn += 1
        with contextlib.suppress(httpx.HTTPError):
            if turn % 29 == 0:
                client.give_up()
            elif turn % 7 == 0:
                client.post(
                    "/v1/completions", {"model": ("demo", "upper", "french")[turn % 3], "prompt": _LONG, **LONG}
                )
            elif turn % 31 == 0:
                Client(client.server).chat()
            elif turn % 23 == 0:
                client.chat("no-such-model")
            else:
                asks[turn % len(asks)]()


def main() -> int:
    """Start everything, load, draw, stop."""
    folder = sys.argv[1]
    seconds = int(sys.argv[2]) if len(sys.argv) > 2 else 170
    binary = install_prometheus.find("prometheus")
    if binary is None:
        raise SystemExit("prometheus is missing; run tests/tools/install_prometheus.py")
    server = Server(
        [*DEMO, "--max-model-len", "1024", "--max-num-seqs", "12", "--allow-model-control", "--api-key", _KEY]
    )
    with tempfile.TemporaryDirectory() as place:
        try:
            server.wait_ready()
            prometheus = Prometheus(binary, Path(place), server, RULES)
            try:
                end = time.time() + seconds
                with ThreadPoolExecutor(24) as pool:
                    for number in range(24):
                        # More and more workers, then fewer.
                        pool.submit(worker, Client(server, _KEY), end - abs(number - 8) * seconds / 40, number)
                        time.sleep(seconds / 60)
                    # For a moment the model is not there: requests fail.
                    Client(server, _KEY).post("/v2/repository/models/demo/unload", {})
                    time.sleep(0.5)
                    Client(server, _KEY).post("/v2/repository/models/demo/load", {})
                command = [sys.executable, str(ROOT / "runtime/tools/draw_dashboards.py"), prometheus.url, folder]
                return subprocess.run(command, check=False).returncode
            finally:
                prometheus.stop()
        finally:
            server.stop()


if __name__ == "__main__":
    raise SystemExit(main())
