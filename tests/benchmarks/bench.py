"""Our server, `vllm serve` and the engine alone, one after the other in turns, with the same engine flags.

    python -m tests.benchmarks.bench --out FOLDER [--rounds 5] [--quick] [--servers ours vllm] [--modes chat-stream]

`rust` is `vllm serve` with vLLM's own front end in Rust, whose binary is downloaded once with the CUDA wheel;
`no-SHORTCUT` is ours without one of `--fast-path`.

Each round starts every server once and runs all its loads; ratios are taken within a round, and their median is what
counts, since the machine drifts. With --together they are started once, and those that are not loaded are paused. Chat
streams are loaded by `vllm bench serve`, and again, as everything else, by a client that only counts frames. Writes
results.json, results.md and results.png (.svg without matplotlib) to FOLDER.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.load import MODES, SIZES
from tests.benchmarks.servers import CONFIGURATIONS, ENGINE_ENV, MODEL, Configuration, Running, with_policies, with_rust
from tests.observability.otlp import Receiver

# What our profile and vLLM set differently is set for both.
_ENGINE = ["--max-model-len", "1024", "--max-num-seqs", "128", "--max-num-batched-tokens", "2048"]
_SHOWN = ("tokens_per_s", "cpu_us_per_token", "ttft_ms", "ttft_p99_ms", "itl_ms")


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def engine_flags(args: argparse.Namespace) -> list[str]:
    """Engine flags that all servers get."""
    return [*_ENGINE, *([] if args.compile else ["--enforce-eager"]), *args.engine_arguments]


def vllm_bench(server: Running, concurrency: int, requests: int, args: argparse.Namespace) -> dict[str, Any]:
    """Load with `vllm bench serve`, the client that people trust. It parses every frame."""
    from kserve_vllm.config import demo

    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.vllm_command",
            "bench",
            "serve",
            "--backend",
            "openai-chat",
            "--endpoint",
            "/v1/chat/completions",
            "--base-url",
            f"http://127.0.0.1:{server.http_port}",
            "--model",
            MODEL,
            "--tokenizer",
            str(demo.folder("model")),
            "--dataset-name",
            "random",
            "--random-input-len",
            str(args.prompt_tokens),
            "--random-output-len",
            str(args.tokens),
            "--ignore-eos",
            "--num-prompts",
            str(requests),
            "--max-concurrency",
            str(concurrency),
            "--save-result",
            "--percentile-metrics",
            "ttft,itl,tpot",
            "--metric-percentiles",
            "99",
            "--disable-tqdm",
            "--temperature",
            "0",
            "--result-dir",
            folder,
            "--result-filename",
            "result.json",
        ]
        if server.configuration.key:
            command += ["--header", f"Authorization=Bearer {server.configuration.key}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        path = Path(folder) / "result.json"
        if done.returncode or not path.exists():
            raise RuntimeError(
                f"vllm bench serve ended with {done.returncode}:\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
            )
        found = json.loads(path.read_text())
    if found["completed"] != requests:
        raise RuntimeError(f"{requests - found['completed']} of {requests} requests failed: {found.get('errors')}")
    return {
        "tokens": found["total_output_tokens"],
        "tokens_per_s": found["output_throughput"],
        "ttft_ms": found["mean_ttft_ms"],
        "ttft_p99_ms": found["p99_ttft_ms"],
        "itl_ms": found["mean_tpot_ms"],
        "gap_p99_ms": found["p99_itl_ms"],
        "client": "vllm bench serve",
    }


def measure(server: Running, number: int, mode: str, concurrency: int, args: argparse.Namespace) -> dict[str, Any]:
    """One cell: a warm-up, then the load. Prompts of `intake` are new in each round, so that nobody remembers them."""
    # Few streams take longer for a token. Whole waves, since all requests are of one length.
    tokens = args.tokens_per_cell * min(1.0, (concurrency + 2) / 32)
    requests = max(4 if concurrency == 1 else 1, round(tokens / args.tokens / concurrency)) * concurrency
    options = {"prompt_tokens": args.prompt_tokens, "tokens": args.tokens}
    if mode in SIZES:
        # One token each: as many requests as take about as long.
        requests *= 4
        options = dict(zip(options, SIZES[mode], strict=True))
        seeds = (1, 1) if mode == "prefix-hot" else (2 * number + 2, 2 * number + 3)
        server.load(mode, concurrency, max(2, requests // 4), seed=seeds[0], **options)
        return server.load(mode, concurrency, requests, seed=seeds[1], **options)
    own = "chat-stream" if mode == "chat-stream-vllm-bench" else mode
    server.load(own, concurrency, max(2, min(requests // 4, concurrency)), seed=1, **options)
    if mode == "chat-stream-vllm-bench":
        return server.measured(lambda: vllm_bench(server, concurrency, requests, args))
    return server.load(mode, concurrency, requests, seed=2, **options)


def offline(args: argparse.Namespace) -> dict[str, Any]:
    """The ceiling: the engine alone, in one process with its caller, with as many sequences as 64 streams have."""
    from kserve_vllm.config import demo

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.vllm_command",
            "bench",
            "throughput",
            "--model",
            str(demo.folder("model")),
            "--dataset-name",
            "random",
            "--random-input-len",
            str(args.prompt_tokens),
            "--random-output-len",
            str(args.tokens),
            "--num-prompts",
            str(max(64, args.tokens_per_cell // args.tokens)),
            *engine_flags(args),
            "--max-num-seqs",
            "64",
            "--output-json",
            str(path),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=600, env={**os.environ, **ENGINE_ENV}
        )
        if done.returncode:
            raise RuntimeError(f"vllm bench throughput ended with {done.returncode}:\n{done.stderr[-3000:]}")
        found = json.loads(path.read_text())
    requests = found["num_requests"]
    return {"tokens_per_s": requests * args.tokens / found["elapsed_time"]}


def load(server: Running, number: int, mode: str, concurrency: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one load against a server that runs; its cell."""
    name = server.configuration.name
    figures = measure(server, number, mode, concurrency, args)
    say(f"  {name:9} {mode:22} x{concurrency:<4}" + "".join(f" {key} {figures[key]:.1f}" for key in _SHOWN))
    return {"round": number, "server": name, "mode": mode, "concurrency": concurrency, **figures}


def loads(number: int, names: Sequence[str], args: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """Mode, streams and server of each cell of a round, the servers next to each other."""
    for mode in args.modes if number % 2 == 0 else args.modes[::-1]:
        for concurrency in args.concurrency:
            for name in names:
                if CONFIGURATIONS[name].answers(mode):
                    yield mode, concurrency, name


@contextlib.contextmanager
def started(name: str, number: int, args: argparse.Namespace, report: dict[str, Any]) -> Iterator[Running]:
    """A server, from its start to its end."""
    say(f"round {number + 1}/{args.rounds}: starting {name}")
    with configured(name) as configuration:
        server = Running(configuration, engine_flags(args), args.instant)
        try:
            yield server
            start = {
                "round": number,
                "server": name,
                "ready_s": server.ready_s,
                "peak_mib": server.memory_mib(peak=True),
            }
            report["starts"].append(start)
            say(f"  {name:9} ready after {server.ready_s:.1f} s, peak {start['peak_mib']:.0f} MiB")
        finally:
            server.stop()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All rounds. Results are written after each of them."""
    report: dict[str, Any] = {
        "machine": machine(),
        "arguments": vars(args) | {"out": str(args.out)},
        "cells": [],
        "starts": [],
        "offline": [],
    }
    deadline = time.monotonic() + args.minutes * 60
    with contextlib.ExitStack() as together:
        running: dict[str, Running] = {}
        if args.together:
            for name in args.servers:
                running[name] = together.enter_context(started(name, 0, args, report))
                running[name].pause()
        for number in range(args.rounds):
            # Every other round in the opposite order, so that no server or mode always follows the same one.
            names = args.servers if number % 2 == 0 else args.servers[::-1]
            for name in [] if args.together else names:
                if time.monotonic() < deadline:
                    with started(name, number, args, report) as server:
                        for mode, concurrency, _ in loads(number, [name], args):
                            report["cells"].append(load(server, number, mode, concurrency, args))
            for mode, concurrency, name in loads(number, names, args) if args.together else []:
                if time.monotonic() < deadline:
                    running[name].resume()
                    report["cells"].append(load(running[name], number, mode, concurrency, args))
                    running[name].pause()
            if time.monotonic() > deadline:
                say("out of time: stopping here")
                break
            if args.offline:
                say(f"round {number + 1}/{args.rounds}: the engine alone, with vllm bench throughput")
                report["offline"].append({"round": number, **offline(args)})
                say(f"  the engine alone: {report['offline'][-1]['tokens_per_s']:.0f} tokens/s")
            write(report, args.out)
    write(report, args.out)
    return report


@contextlib.contextmanager
def configured(name: str) -> Iterator[Configuration]:
    """A configuration by name, with what it needs around it."""
    if name != "policies":
        yield with_rust() if name == "rust" else CONFIGURATIONS[name]
        return
    collector = Receiver()
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield with_policies(Path(folder), collector.endpoint)
    finally:
        collector.stop()


def machine() -> dict[str, Any]:
    """What was measured on, and with which versions."""
    from importlib.metadata import version

    from vllm.version import __version__ as vllm_version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "vllm": str(vllm_version),
        "kserve-vllm": version("kserve-vllm"),
        "at": time.strftime("%Y-%m-%d %H:%M"),
    }


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians per cell, and the median over rounds of the ratio to `vllm` in the same round."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    by_round: dict[tuple[str, int, str, int], dict[str, Any]] = {}
    for cell in report["cells"]:
        groups.setdefault((cell["mode"], cell["concurrency"], cell["server"]), []).append(cell)
        by_round[cell["mode"], cell["concurrency"], cell["server"], cell["round"]] = cell
    found = []
    for (mode, concurrency, server), cells in sorted(groups.items()):
        row: dict[str, Any] = {"mode": mode, "concurrency": concurrency, "server": server, "rounds": len(cells)}
        for key in _SHOWN:
            row[key] = statistics.median(cell[key] for cell in cells)
            ratios = [
                cell[key] / other[key]
                for cell in cells
                if (other := by_round.get((mode, concurrency, "vllm", cell["round"]))) and other[key]
            ]
            row[f"{key}_ratio"] = statistics.median(ratios) if ratios else None
            row[f"{key}_ratios"] = ratios
        found.append(row)
    return found


def spread(ratios: Sequence[float]) -> str:
    """The median, and the least and the largest of several."""
    if len(set(ratios)) < 2:
        return f"{ratios[0]:.2f}" if ratios else ""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def over(cells: Sequence[dict[str, Any]], server: str, base: str) -> Iterator[str]:
    """A line for each load of a server that `base` had too: ratios within a round, as `spread` writes them."""
    found: dict[Any, dict[str, Any]] = {
        (cell["mode"], cell["concurrency"], cell["round"], cell["server"]): cell for cell in cells
    }
    for mode, concurrency in sorted({(cell["mode"], cell["concurrency"]) for cell in cells}):
        pairs = [
            (cell, found[key])
            for (*load, name), cell in found.items()
            if load[:2] == [mode, concurrency] and name == server and (key := (*load, base)) in found
        ]
        if pairs:
            ratios = [
                f"{key} {spread([cell[key] / other[key] for cell, other in pairs])}"
                for key in ("tokens_per_s", "cpu_us_per_token")
            ]
            yield f"{server} over {base}, {mode} x{concurrency}: {', '.join(ratios)}"


def over_own_stream(cells: Sequence[dict[str, Any]], mode: str) -> list[float]:
    """Tokens per second of gRPC streams over those of the same server's OpenAI streams in the same round."""
    streams = {
        (cell["server"], cell["concurrency"], cell["round"]): cell["tokens_per_s"]
        for cell in cells
        if cell["mode"] == "chat-stream"
    }
    return [
        cell["tokens_per_s"] / streams[key]
        for cell in cells
        if cell["mode"] == mode and (key := (cell["server"], cell["concurrency"], cell["round"])) in streams
    ]


def table(report: dict[str, Any]) -> str:
    """The results for people, in Markdown."""
    about = report["machine"]
    lines = [
        f"{about['cpus']} x {about['cpu']}, Python {about['python']}, vLLM {about['vllm']}, {about['at']}",
        "",
        "| mode | streams | server | tokens/s | CPU us/token | TTFT ms | p99 TTFT ms | ms/token | tokens/s : vllm "
        "| CPU : vllm | TTFT : vllm |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows(report):
        ratios = [row[f"{key}_ratios"] for key in ("tokens_per_s", "cpu_us_per_token", "ttft_ms")]
        lines.append(
            f"| {row['mode']} | {row['concurrency']} | {row['server']} | {row['tokens_per_s']:,.0f} "
            f"| {row['cpu_us_per_token']:.1f} | {row['ttft_ms']:.1f} | {row['ttft_p99_ms']:.1f} "
            f"| {row['itl_ms']:.2f} | " + " | ".join(map(spread, ratios)) + " |"
        )
    servers = sorted({cell["server"] for cell in report["cells"]})
    pairs = [(each, "rust") for each in ("ours", "policies")]
    pairs += [("ours", each) for each in servers if each.startswith("no-")]
    for server, base in pairs:
        for line in over(report["cells"], server, base):
            lines += ["", line]
    for mode in ("grpc-stream", "grpc-stream-shared"):
        if ratios := over_own_stream(report["cells"], mode):
            lines += ["", f"{mode} over chat-stream of the same server, tokens/s: {spread(ratios)}"]
    for name in sorted({start["server"] for start in report["starts"]}):
        starts = [start for start in report["starts"] if start["server"] == name]
        ready = statistics.median(start["ready_s"] for start in starts)
        peak = statistics.median(start["peak_mib"] for start in starts)
        lines += ["", f"{name}: ready after {ready:.1f} s, peak memory of the front end {peak:.0f} MiB"]
    if report["offline"]:
        rate = statistics.median(each["tokens_per_s"] for each in report["offline"])
        lines += ["", f"the engine alone: {rate:,.0f} tokens/s"]
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], folder: Path) -> None:
    """Write JSON, table and plot."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report, indent=1, default=str))
    (folder / "results.md").write_text(table(report))
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        (folder / "results.svg").write_text(bars(rows(report)))
        return
    found = rows(report)
    modes = sorted({row["mode"] for row in found})
    figure, axes = pyplot.subplots(2, len(modes), figsize=(4 * len(modes), 7), squeeze=False)
    for column, mode in enumerate(modes):
        for line, (key, label) in enumerate((("tokens_per_s", "tokens/s"), ("cpu_us_per_token", "CPU us/token"))):
            axis = axes[line][column]
            for server in sorted({row["server"] for row in found}):
                points = [(r["concurrency"], r[key]) for r in found if r["mode"] == mode and r["server"] == server]
                if points:
                    axis.plot(*zip(*sorted(points), strict=True), marker="o", label=server)
            axis.set(title=mode if not line else "", xscale="log", xlabel="streams", ylabel=label, ylim=(0, None))
            axis.legend()
    figure.tight_layout()
    figure.savefig(folder / "results.png", dpi=110)


def bars(found: list[dict[str, Any]]) -> str:
    """The plot where matplotlib is not installed: tokens per second and processor time as bars, in SVG."""
    most = {key: max((row[key] for row in found), default=1.0) or 1.0 for key in _SHOWN[:2]}
    lines = []
    for number, row in enumerate(found):
        top = 30 + 18 * number
        name = f"{row['mode']} x{row['concurrency']} {row['server']}"
        lines.append(f'<text x="4" y="{top + 11}">{name}</text>')
        for left, key, colour in ((260, _SHOWN[0], "#4878a8"), (620, _SHOWN[1], "#c0683c")):
            width = 260 * row[key] / most[key]
            lines.append(f'<rect x="{left}" y="{top}" width="{width:.1f}" height="13" fill="{colour}"/>')
            lines.append(f'<text x="{left + width + 4:.1f}" y="{top + 11}">{row[key]:,.1f}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="980" height="{40 + 18 * len(found)}" '
        'font-family="sans-serif" font-size="12">'
    )
    titles = '<text x="260" y="18">tokens/s</text><text x="620" y="18">front-end CPU us/token</text>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', titles, *lines, "</svg>", ""])


def main() -> None:
    """Run and print the table."""
    modes = ["chat-stream-vllm-bench", *MODES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--servers", nargs="+", choices=list(CONFIGURATIONS), default=["ours", "vllm", "policies"])
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=modes,
        default=["chat-stream-vllm-bench", "chat-stream", "chat", "v2", "grpc-stream"],
    )
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 16, 64, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument(
        "--tokens-per-cell", type=int, default=24_576, help="output tokens of a cell with 30 streams or more"
    )
    parser.add_argument("--minutes", type=float, default=120, help="start no further server after this time")
    parser.add_argument(
        "--together",
        action="store_true",
        help="start each server once, load them in turns, cell by cell, and stop the others meanwhile",
    )
    parser.add_argument(
        "--instant",
        action="store_true",
        help="front ends alone, with an engine that answers by itself: see `instant_engine`",
    )
    parser.add_argument("--compile", action="store_true", help="let vLLM compile; eager otherwise")
    parser.add_argument("--no-offline", dest="offline", action="store_false", help="leave the engine alone out")
    parser.add_argument("--engine-arguments", nargs=argparse.REMAINDER, default=[], help="further engine flags; last")
    parser.add_argument("--quick", action="store_true", help="one round, few tokens: shows that it works")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.tokens_per_cell, args.concurrency, args.offline = 1, 4096, [1, 16], False
    report = run(args)
    write(report, args.out)
    print(table(report))


if __name__ == "__main__":
    main()
