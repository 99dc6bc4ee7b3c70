"""`kserve-vllm bench`: flags in, load out, a table, JSON and a picture back."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops import argument_types
from kserve_vllm.ops.bench import clients, compare, result
from kserve_vllm.ops.bench.load import Played, Point, play
from kserve_vllm.ops.bench.prompts import FromFile, LoadPrompt, Prompts, PromptShape, WordCount
from kserve_vllm.ops.model.measured import read_benchmark
from kserve_vllm.ops.operations import CommandFailed, split_url
from kserve_vllm.ops.tables import bar, seconds, table

_EPILOG = """
A first look, then a sweep, then the load at which the SLO breaks:
  kserve-vllm bench http://localhost:8080
  kserve-vllm bench http://localhost:8080 --concurrency 1,4,16,64 --save bench.json --picture bench.png
  kserve-vllm bench http://localhost:8080 --rate 2,4,8 --first-token 1 --gap 0.05 --time 120
The prompts that you have, or prompts like yours; other protocols; a key; behind KServe's ingress:
  kserve-vllm bench http://localhost:8080 --prompts prompts.jsonl
  kserve-vllm bench http://localhost:8080 --prompt 1500 --output 300 --spread 0.5 --shared-prefix 0.6
  kserve-vllm bench grpc://localhost:8081 --model llm
  KEY=... kserve-vllm bench https://gateway.example --api-key-env KEY --header Host:llm.team-a.example.com
What follows from it:
  kserve-vllm plan ./model --gpu L4 --calibrate bench.json
  kserve-vllm bench compare before.json after.json

First token: from sending to the first piece with text. Gap: the mean time between an answer's tokens. End to end: to
the last byte. Answers have exactly --output tokens unless --let-end; each prompt is another one, so that the prefix
cache has only what --shared-prefix says. Percentiles are of answered requests; the SLO counts failed ones as missed.

Exit codes: 0 the SLO was kept by some load (without one: every request was answered), 1 it was not, 2 an argument can't
be used, 3 nothing could be asked. 130 after Ctrl-C, with the
loads that were complete.
docs/guides/benchmarking.md says how to read it, and what the file holds.
"""
_EPILOG_COMPARE = """
Examples:
  kserve-vllm bench compare before.json after.json
  kserve-vllm bench compare before.json after.json --tolerance 0.1 --json
Results of `vllm bench serve --save-result --save-detailed` are read too. Each interval is of NEW / OLD, from drawing
stretches of both runs again. One run knows its own noise, not what differs between two starts: measure with --repeat
and on a quiet machine.

Exit codes: 0 nothing is worse, 1 something is (its whole interval lies beyond the tolerance), 2 a file can't be used.
"""
_MOST_POINTS = 100
_PROBE = (16, 64)


def main(arguments: Sequence[str]) -> int:
    """Run `kserve-vllm bench ...`; returns the exit code.

    Raises:
        ConfigError: an argument or a file can't be used.
        CommandFailed: nothing can be asked.
    """
    if arguments[:1] == ["compare"]:
        return _compare(arguments[1:])
    args = parser().parse_args(list(arguments))
    target, points = _target(args), _points(args)
    slo = result.SLO(args.first_token, args.gap, args.end_to_end, args.share)
    if target.protocol not in clients.STREAMED and (slo.first_token or slo.gap):
        raise ConfigError(f"--protocol {target.protocol} answers whole: it has no first token and no gap to bound")
    if args.picture:
        from kserve_vllm.ops.pictures import pyplot

        pyplot()  # speaks up before the load, not after it
    if args.save:
        result.writable(args.save)  # before the load, too
    rows: list[result.Row] = []
    content: dict[str, object] = {}
    try:
        asyncio.run(_bench(args, target, points, slo, rows, content))
    except clients.Unreachable as error:
        raise CommandFailed(str(error), 3) from None
    except KeyboardInterrupt:
        if not rows:
            raise
        print(f"\nstopped; complete: {', '.join(map(result.load_name, rows))}", file=sys.stderr)
        print(json.dumps(content, indent=1) if args.json else _human(content, slo))
        return 130
    print(json.dumps(content, indent=1) if args.json else _human(content, slo))
    if args.picture:
        from kserve_vllm.ops.pictures import draw_bench

        draw_bench(args.picture, rows, slo)
        print(f"drawn: {args.picture}", file=sys.stderr)
    return 0 if any(result.kept(row, slo) for row in rows) and (slo.any or all(not r["failed"] for r in rows)) else 1


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(
        prog="kserve-vllm bench",
        usage="kserve-vllm bench URL [options]\n       kserve-vllm bench compare OLD NEW [options]",
        description="Put load on a server and say what its clients see: first token, gap, end to end, goodput.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("url", metavar="URL", help="http(s)://HOST:PORT, or grpc(s)://HOST:PORT")
    top.add_argument("--model", help="its name (default: the first that the server names)")
    top.add_argument(
        "--protocol",
        choices=clients.PROTOCOLS,
        metavar="NAME",
        help=f"{', '.join(clients.PROTOCOLS)} (default: chat; grpc-stream for grpc://)",
    )
    top.add_argument("--api-key-env", metavar="VARIABLE", help="variable that holds the key")
    top.add_argument("--api-key-file", type=Path, metavar="FILE", help="file that holds the key")
    top.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="send this too (no secrets)")
    top.add_argument("--ca", metavar="PEM", help="authorities to trust (default: the system's)")
    load = top.add_argument_group("load")
    load.add_argument("--concurrency", metavar="N,N", help="requests always in flight, for each load (default: 1,4,16)")
    load.add_argument("--rate", metavar="R,R", help="requests a second at random times, for each load")
    load.add_argument(
        "--requests",
        type=argument_types.count,
        metavar="N",
        help="most of a load (default: 20 for each at once; of a rate: --time)",
    )
    load.add_argument(
        "--time", type=argument_types.positive, default=60.0, help="seconds in which a load is sent (default: 60)"
    )
    load.add_argument(
        "--timeout", type=argument_types.positive, default=120.0, help="seconds for one request (default: 120)"
    )
    load.add_argument(
        "--repeat", type=argument_types.count, default=1, metavar="N", help="run all of it so often (default: 1)"
    )
    load.add_argument(
        "--warmup", type=argument_types.whole, default=4, metavar="N", help="requests before it (default: 4)"
    )
    what = top.add_argument_group("prompts")
    what.add_argument("--prompts", type=Path, metavar="JSONL", help="lines with prompt or messages, and max_tokens")
    what.add_argument("--prompt", type=argument_types.count, help="mean tokens of a prompt (default: 256)")
    what.add_argument(
        "--output", type=argument_types.count, default=128, help="mean tokens of an answer (default: 128)"
    )
    what.add_argument(
        "--spread", type=argument_types.number, default=0.0, help="deviation of the logarithm of both (default: 0)"
    )
    what.add_argument(
        "--shared-prefix", type=argument_types.fraction, default=0.0, help="share of a prompt that all have in common"
    )
    what.add_argument("--seed", type=argument_types.whole, default=0, help="of prompts and arrivals (default: 0)")
    what.add_argument("--let-end", action="store_true", help="let answers end where the model ends them")
    what.add_argument("--temperature", type=argument_types.number, default=0.0, help="of the sampling (default: 0)")
    what.add_argument("--extra", metavar="JSON", help='fields for each body (V2: parameters), such as {"top_k": 1}')
    goal = top.add_argument_group("SLO")
    goal.add_argument("--first-token", type=argument_types.positive, metavar="SECONDS", help="bound of the first token")
    goal.add_argument(
        "--gap", type=argument_types.positive, metavar="SECONDS", help="bound of the mean time between tokens"
    )
    goal.add_argument("--end-to-end", type=argument_types.positive, metavar="SECONDS", help="bound of the whole answer")
    goal.add_argument(
        "--share", type=argument_types.share, default=0.95, help="of the requests that keep them (default: 0.95)"
    )
    out = top.add_argument_group("output")
    out.add_argument("--save", type=Path, metavar="FILE", help="write the result as JSON, after each load")
    out.add_argument("--json", action="store_true", help="print the result as JSON")
    out.add_argument("--picture", type=Path, metavar="PNG", help="draw it; needs matplotlib")
    out.add_argument("-q", "--quiet", action="store_true", help="no progress on standard error")
    return top


def _target(args: argparse.Namespace) -> clients.LoadTarget:
    url = args.url if "://" in args.url else f"http://{args.url}"
    parts = split_url(url, ("http", "https", "grpc", "grpcs"))
    if parts.username or parts.password:
        raise ConfigError("a key or password in the address ends in logs and process lists: take --api-key-env")
    over_grpc = parts.scheme.startswith("grpc")
    protocol = args.protocol or ("grpc-stream" if over_grpc else "chat")
    if over_grpc != (protocol in clients.OVER_GRPC):
        own = "grpc://HOST:PORT, which is another port than HTTP's (8081)" if not over_grpc else "http://HOST:PORT"
        raise ConfigError(f"--protocol {protocol} wants {own}")
    path = parts.path.rstrip("/").removesuffix("/v1")
    headers = {}
    for word in args.header:
        name, colon, value = word.partition(":")
        if not colon or not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name.strip(), re.ASCII) or not value.isprintable():
            raise ConfigError(f"--header {word!r}: write NAME:VALUE")
        if name.strip().lower() in ("authorization", "x-api-key", "api-key"):
            raise ConfigError(
                "--header: a key on the command line is seen by all: take --api-key-env or --api-key-file"
            )
        headers[name.strip()] = value.strip()
    try:
        extra = json.loads(args.extra) if args.extra else {}
    except ValueError as error:
        raise ConfigError(f"--extra: {error}") from None
    if not isinstance(extra, dict):
        raise ConfigError("--extra: not a JSON object")
    return clients.LoadTarget(
        url=f"{parts.scheme}://{parts.netloc}{path}",
        protocol=protocol,
        model=args.model or "",
        key=read_key(args.api_key_env, args.api_key_file),
        headers=headers,
        timeout_s=args.timeout,
        temperature=args.temperature,
        full_length=not args.let_end,
        extra=extra,
        ca=args.ca,
    )


def read_key(variable: str | None, file: Path | None) -> str:
    """The key from a variable or a file; "" where neither is named.

    Raises:
        ConfigError: there is none there, or both are named.
    """
    if variable and file:
        raise ConfigError("--api-key-env and --api-key-file: one of them")
    if variable:
        key = os.environ.get(variable, "").strip()
        if not key:
            raise ConfigError(f"--api-key-env: the variable {variable} is not set")
        return key
    if file:
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file: {error}") from None
        if not key or "\n" in key:
            raise ConfigError(f"--api-key-file {file}: not one line with a key")
        return key
    return ""


def _points(args: argparse.Namespace) -> list[Point]:
    if args.concurrency and args.rate:
        raise ConfigError("--concurrency and --rate: one at a time")
    found = []
    if args.rate:
        for text in args.rate.split(","):
            try:
                rate = argument_types.positive(text)
            except (ValueError, argparse.ArgumentTypeError):
                raise ConfigError(f"--rate {args.rate!r}: write numbers above 0, such as 1,2,4") from None
            found.append(Point(None, rate, args.requests or max(1, math.ceil(rate * args.time)), args.time))
    else:
        for text in (args.concurrency or "1,4,16").split(","):
            try:
                number = argument_types.count(text)
            except (ValueError, argparse.ArgumentTypeError):
                raise ConfigError(f"--concurrency {args.concurrency!r}: write whole numbers, such as 1,4,16") from None
            found.append(Point(number, None, args.requests or 20 * number, args.time))
    found *= args.repeat
    if len(found) > _MOST_POINTS:
        raise ConfigError(f"{len(found)} loads are too many ({_MOST_POINTS})")
    return found


async def _bench(
    args: argparse.Namespace,
    target: clients.LoadTarget,
    points: Sequence[Point],
    slo: result.SLO,
    rows: list[result.Row],
    content: dict[str, object],
) -> None:
    """Ask, warm up, play each point; `rows`, and the result in `content`, grow as they end."""
    if not target.model:
        client = clients.connect(target)
        try:
            target = replace(target, model=await client.model())
        finally:
            await client.close()
    client = clients.connect(target)
    progress = _Progress(args)
    try:
        prompts = await _prompts(args, client)
        for number in range(args.warmup):
            # Beyond those of any point, so that they leave nothing of use in the prefix cache.
            await client.send(prompts[1_000_000_000 + number])
        workload = {
            **prompts.describe(),
            "let_end": args.let_end,
            "temperature": args.temperature,
            "time_s": args.time,
            "timeout_s": args.timeout,
        }
        sent = 0
        for number, point in enumerate(points):
            progress.begin(number, len(points), point)
            played = await play(client, prompts, point, args.seed + number, sent, progress.step)
            sent += len(played.answers)
            rows.append(result.row(played, slo))
            progress.end(rows[-1])
            content |= result.result(target.url, target.model, target.protocol, workload, slo, rows)
            if args.save:
                result.save(args.save, content)
    finally:
        await client.close()


async def _prompts(args: argparse.Namespace, client: clients.LoadClient) -> Prompts:
    if args.prompts:
        if args.prompt or args.spread or args.shared_prefix:
            raise ConfigError("--prompts has the prompts in it; leave out --prompt, --spread and --shared-prefix")
        prompts: Prompts = FromFile(args.prompts, args.output)
        answer = await client.send(replace(prompts[0], output=1))
        if answer.error:
            raise clients.Unreachable(f"the first prompt was not answered: {answer.error}")
        return prompts
    return PromptShape(
        args.prompt or 256, args.output, args.spread, args.shared_prefix, await _count_words(client), args.seed
    )


async def _count_words(client: clients.LoadClient) -> WordCount:
    """Ask with two short prompts how the server counts."""
    plain = PromptShape(1, 1, 0.0, 0.0, WordCount(0.0, 1.0), 7)
    counted = []
    for words in _PROBE:
        answer = await client.send(LoadPrompt(plain_words(plain, words), 1))
        if answer.error:
            raise clients.Unreachable(f"a prompt of {words} words was not answered: {answer.error}")
        counted.append(answer.prompt)
    if not all(counted):
        return WordCount()
    per_word = max(0.5, (counted[1] - counted[0]) / (_PROBE[1] - _PROBE[0]))
    return WordCount(max(0.0, counted[0] - per_word * _PROBE[0]), per_word, True)


def plain_words(shape: PromptShape, words: int) -> str:
    """So many words."""
    return replace(shape, prompt=words)[0].text


class _Progress:
    """What a person sees while it runs: on a terminal a line that changes, else a line for each load."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._quiet = args.quiet
        self._live = sys.stderr.isatty() and not args.quiet
        self._told = 0.0
        self._text = ""

    def begin(self, number: int, of: int, point: Point) -> None:
        """A load begins."""
        self._text, self._began, self._point = f"[{number + 1}/{of}] {point.name}", time.monotonic(), point

    def step(self, played: Played) -> None:
        """A request is over."""
        now = time.monotonic()
        if not self._live or now - self._told < 0.2:
            return
        self._told = now
        done, failed = len(played.answers), sum(bool(a.error) for a in played.answers)
        left = f", {failed} failed" if failed else ""
        print(
            f"\r\x1b[K{self._text}: {done} of at most {self._point.requests} requests, {now - self._began:.0f} s{left}",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def end(self, row: Mapping[str, Any]) -> None:
        """A load is over."""
        if self._quiet:
            return
        start = "\r\x1b[K" if self._live else ""
        failed = f", {row['failed']} FAILED" if row["failed"] else ""
        print(f"{start}{self._text}: {row['completed']} answered in {row['duration']:.1f} s{failed}", file=sys.stderr)


def _ms(value: float | None) -> str:
    return "-" if value is None else seconds(value / 1000)


def _human(content: Mapping[str, Any], slo: result.SLO) -> str:
    rows: Sequence[result.Row] = content["results"]
    head = (
        "LOAD",
        "DONE",
        "FAILED",
        "REQ/S",
        "TOKENS/S",
        "FIRST TOKEN P50",
        "P95",
        "P99",
        "GAP P50",
        "P95",
        "END P50",
        "P95",
        *(("IN SLO",) if slo.any else ()),
    )
    lines = [head]
    for row in rows:
        mark = ("* " if result.kept(row, slo) else "  ") if slo.any else ""
        cells = [mark + result.load_name(row), f"{row['completed']:,}", f"{row['failed']:,}"]
        cells += [f"{row['request_throughput']:.2f}", f"{row['output_throughput']:,.0f}"]
        cells += [
            _ms(row[name])
            for name in (
                "median_ttft_ms",
                "p95_ttft_ms",
                "p99_ttft_ms",
                "median_tpot_ms",
                "p95_tpot_ms",
                "median_e2el_ms",
                "p95_e2el_ms",
            )
        ]
        if slo.any:
            cells.append(f"{row['good_share']:.1%}")
        lines.append(tuple(cells))
    work = content["workload"]
    shape = (
        f"{work['prompts']} prompts of {work['file']}"
        if "file" in work
        else f"prompts of {_mean(rows, 'total_input_tokens'):.0f} tokens, answers of "
        f"{_mean(rows, 'total_output_tokens'):.0f}, shared prefix {work['shared_prefix']:.0%}"
    )
    speeds = [(result.load_name(row), row["output_throughput"]) for row in rows]
    top, width = max(speed for _, speed in speeds), max(len(name) for name, _ in speeds)
    text = [
        f"{content['model']} at {content['url']}, {content['protocol']}; {shape}",
        "",
        table(lines, right=range(1, len(head))),
        "",
        "output tokens per second",
        *(f"{name:<{width}}  {bar(speed, top, 50)} {speed:,.0f}" for name, speed in speeds),
    ]
    if slo.any:
        bounds = [
            f"{name} {seconds(bound)}"
            for name, bound in (("first token", slo.first_token), ("gap", slo.gap), ("end to end", slo.end_to_end))
            if bound is not None
        ]
        best = max((row for row in rows if result.kept(row, slo)), key=lambda r: r["request_goodput"], default=None)
        verdict = (
            f"kept; most within it at {result.load_name(best)}: {best['request_goodput']:.2f} good requests/s"
            if best
            else "NOT kept by any load"
        )
        text += ["", f"SLO ({slo.share:.0%} with {', '.join(bounds)}): {verdict}"]
    if found := result.errors(rows):
        text += ["", "not answered:", *(f"{count:6,}  {error}" for error, count in found[:5])]
    if any(row["client_busy"] > 0.85 for row in rows):
        text += ["", "This client was busy all the time in some loads: their figures are its own, not the server's."]
    return "\n".join(text)


def _mean(rows: Sequence[result.Row], name: str) -> float:
    return float(sum(row[name] for row in rows)) / float(max(1, sum(row["completed"] for row in rows)))


def _compare(arguments: Sequence[str]) -> int:
    top = argparse.ArgumentParser(
        prog="kserve-vllm bench compare",
        description="Say what differs between two results beyond their noise.",
        epilog=_EPILOG_COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("old", type=Path, metavar="OLD", help="result of kserve-vllm bench --save")
    top.add_argument("new", type=Path, metavar="NEW", help="the same loads, later or elsewhere")
    top.add_argument(
        "--confidence", type=argument_types.fraction, default=0.95, help="of the intervals (default: 0.95)"
    )
    top.add_argument(
        "--tolerance",
        type=argument_types.fraction,
        default=0.05,
        help="difference that does not matter (default: 0.05)",
    )
    top.add_argument("--json", action="store_true", help="for machines")
    args = top.parse_args(list(arguments))
    found = compare.compare(
        read_benchmark(args.old, "OLD", timed=False),
        read_benchmark(args.new, "NEW", timed=False),
        args.confidence,
        args.tolerance,
    )
    worse = any(each.verdict == "worse" for each in found)
    if args.json:
        print(json.dumps({"worse": worse, "differences": [asdict(each) for each in found]}, indent=1))
        return int(worse)
    rows: list[tuple[str, ...]] = [("LOAD", "FIGURE", "OLD", "NEW", "NEW / OLD", f"{args.confidence:.0%} INTERVAL", "")]
    for each in found:
        shown = [_figure(each.figure, value) for value in (each.old, each.new)]
        ratio = f"{each.new / each.old:.2f}" if each.low is not None else "-"
        interval = f"{each.low:.2f} to {each.high:.2f}" if each.low is not None else "-"
        rows.append((each.load, each.figure, *shown, ratio, interval, each.verdict))
    print(table(rows, right=range(2, 6)))
    counts = {word: sum(each.verdict == word for each in found) for word in ("worse", "better", "same", "unclear")}
    print(
        f"\n{', '.join(f'{count} {word}' for word, count in counts.items() if count)}; differences below "
        f"{args.tolerance:.0%} do not count"
    )
    return int(worse)


def _figure(name: str, value: float) -> str:
    if name == "failed":
        return f"{value:.1%}"
    return f"{value:,.0f}" if name.endswith("/s") else seconds(value)
