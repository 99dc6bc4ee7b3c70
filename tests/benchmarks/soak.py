"""Memory of the front end over many short requests.

    python -m tests.benchmarks.soak [--requests 100000] [--out FOLDER]

Prints the resident memory after every hundredth part, and fails where it grew by more than 2 % over the last half.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tests.benchmarks.servers import CONFIGURATIONS, Running

_MODES = ("chat-stream", "completion-stream", "chat", "v2")


def main() -> None:
    """Run and exit with 1 where memory grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--server", choices=list(CONFIGURATIONS), default="ours")
    parser.add_argument("--minutes", type=float, default=60, help="stop after this time, with what was done by then")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    flags = ["--max-model-len", "1024", "--max-num-seqs", "128", "--enforce-eager", "--dtype", "float32"]
    server = Running(CONFIGURATIONS[args.server], flags)
    began = time.monotonic()
    samples: list[tuple[int, float]] = []
    part = max(1, args.requests // 100)
    try:
        for number in range(100):
            server.load(_MODES[number % len(_MODES)], 64, part, tokens=2, prompt_tokens=8, seed=number)
            samples.append(((number + 1) * part, server.memory_mib()))
            took = time.monotonic() - began
            print(f"{samples[-1][0]:>7} requests  {samples[-1][1]:8.1f} MiB  {took:6.0f} s", flush=True)
            if took > args.minutes * 60:
                break
    finally:
        server.stop()
    last_half = [memory for count, memory in samples if count > samples[-1][0] / 2]
    growth = max(last_half) / last_half[0] - 1
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "soak.json").write_text(json.dumps({"samples": samples, "growth_last_half": growth}))
    print(f"growth over the last half: {100 * growth:.2f} %")
    sys.exit(growth > 0.02)


if __name__ == "__main__":
    main()
