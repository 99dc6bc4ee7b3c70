"""`kserve-vllm batch`: answers the requests of a file in OpenAI's batch form, without files on a server.

The file's requests are sent to a server, which is started for it or named with `--url`. Each answer is a line of the
output file, and on the disk before it counts: started again with the same files, the command goes on where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import httpx

from kserve_vllm.core.errors import ConfigError

Line = dict[str, Any]
"""A request of a batch that was checked, or its answer, as it stands in a line of a file."""

OK, SOME_FAILED, NO_SERVER = 0, 1, 3
_AGAIN = (408, 429, 502, 503, 504)
_PAUSE_MAX_S = 30.0
_SAY_EVERY_S = 10.0
_ON_A_TERMINAL_EVERY_S = 0.5
_LINES_SHOWN = 5

_EPILOG = """
IN.jsonl holds a request a line, as OpenAI's batches have it:
  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "demo", "messages": [...]}}
OUT.jsonl gets an answer a line: {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}.
Their order is that in which they came; custom_id tells them.

Without --url a server is started for the file, and ended with it; what this command does not know is given to it:
  kserve-vllm batch in.jsonl --out out.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --max-model-len 4096
  kserve-vllm batch in.jsonl --out out.jsonl --demo
  OPENAI_API_KEY=... kserve-vllm batch in.jsonl --out out.jsonl --url https://models.example.com

Run again with the same files, it goes on where it was: lines that have an answer are left out, and with --retry-failed
those that were answered with an error are asked again.

Exit codes: 0 every line has an answer with status 200; 1 some have another one (they stand in OUT.jsonl); 2 an argument
or the file can't be used; 3 the server did not start, or nothing answered for as long as --give-up-after says; 130
interrupted. After 3 and 130 the same command goes on.
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; see its epilog for exit codes.

    Raises:
        ConfigError: an argument or the file can't be used.
    """
    parser = argparse.ArgumentParser(
        prog="kserve-vllm batch",
        description="Answer the requests of a file in OpenAI's batch form.",
        usage="kserve-vllm batch IN.jsonl --out OUT.jsonl [--url URL | arguments of serve]",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("input", metavar="IN.jsonl", help="the requests")
    parser.add_argument("--out", required=True, metavar="OUT.jsonl", help="the answers; gone on with where it exists")
    parser.add_argument("--url", help="of a server that runs; its key is taken from OPENAI_API_KEY")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once (default: 64)")
    parser.add_argument("--retry-failed", action="store_true", help="ask again what was answered with an error")
    parser.add_argument(
        "--give-up-after",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long a server may give no answer at all (default: 600)",
    )
    parser.add_argument(
        "--priority", default="batch", help="class of the requests in the server's queue (default: batch)"
    )
    args, of_server = parser.parse_known_args(arguments)
    if args.concurrency < 1:
        raise ConfigError("--concurrency must be 1 or more")
    if args.url and not re.match(r"https?://[^/]", args.url):
        raise ConfigError(f"--url {args.url!r}: write http://HOST:PORT")
    if args.url and of_server:
        raise ConfigError(f"{of_server[0]}: with --url nothing is started that this could be given to")
    source, out = Path(args.input), Path(args.out)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(
            f"--out {out} can't be written: {'a folder' if out.is_dir() else f'{out.parent} is no folder to write in'}"
        )
    requests = check(source)
    done = recall(out, args.retry_failed)
    strange = [each for each in done if each not in requests]
    if strange:
        raise ConfigError(f"--out {out} holds answers to other requests, such as {strange[0]!r}; name another file")
    if len(done) < len(requests):
        # As Ctrl-C: what is answered is kept, and a server that was started is ended.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            code = _answer(args, of_server, source, out, requests, done)
        finally:
            signal.signal(signal.SIGTERM, before)
        if code != OK:
            return code
    answered = recall(out, False)
    failed = sum(not good for good in answered.values())
    print(
        f"{len(answered)} of {len(requests)} requests are answered, {failed} of them with an error: {out}",
        file=sys.stderr,
    )
    return SOME_FAILED if failed else OK


def _answer(
    args: argparse.Namespace, of_server: list[str], source: Path, out: Path, requests: set[str], done: dict[str, bool]
) -> int:
    """Answer what has no answer yet. Returns an exit code; `OK` where all have one."""
    key = next(
        (
            os.environ[name]
            for name in ("OPENAI_API_KEY", "KSERVE_VLLM_API_KEY", "VLLM_API_KEY")
            if os.environ.get(name)
        ),
        None,
    )
    server = None if args.url else _Started(of_server)
    try:
        if server is not None and not server.wait_ready():
            return NO_SERVER
        with out.open("ab") as file:
            work = _Work(args, server, key, file, len(requests), done)
            return asyncio.run(work.run(source))
    finally:
        if server is not None:
            server.stop()


def check(source: Path) -> set[str]:
    """The `custom_id`s of a file's requests.

    Raises:
        ConfigError: a line can't be used; the sentence has the first few, with their numbers.
    """
    seen: set[str] = set()
    wrong: list[str] = []
    try:
        for number, line in _objects(source):
            fault = _fault(line, seen)
            if fault is not None:
                wrong.append(f"line {number}: {fault}")
                if len(wrong) == _LINES_SHOWN:
                    break
            else:
                seen.add(line["custom_id"])
    except OSError as error:
        raise ConfigError(f"{source} can't be read: {error.strerror}") from error
    if wrong:
        raise ConfigError(f"{source}: {'; '.join(wrong)}")
    if not seen:
        raise ConfigError(f"{source} holds no requests")
    return seen


def _fault(line: object, seen: set[str]) -> str | None:
    if not isinstance(line, dict):
        return "no JSON object"
    custom_id, url = line.get("custom_id"), line.get("url")
    if not isinstance(custom_id, str) or not custom_id:
        return "custom_id must be a text"
    if custom_id in seen:
        return f"custom_id {custom_id[:64]!r} stands in an earlier line too"
    if line.get("method") != "POST":
        return "method must be POST"
    if not isinstance(url, str) or not url.startswith("/v1/"):
        return "url must be a path such as /v1/chat/completions"
    if not isinstance(line.get("body"), dict):
        return "body must be an object"
    return "a batch has no streams: leave stream out" if line["body"].get("stream") else None


def _objects(source: Path) -> Iterator[tuple[int, Any]]:
    with source.open("rb") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                try:
                    yield number, json.loads(text)
                except (ValueError, RecursionError):
                    yield number, None


def recall(out: Path, retry_failed: bool) -> dict[str, bool]:
    """Which requests have an answer, and whether it is a good one. What was left half written is cut off.

    Args:
        out: the output file; there may be none.
        retry_failed: forget answers that are errors, in the file too.

    Raises:
        ConfigError: it can't be read or written, or is no such file.
    """
    if not out.exists():
        return {}
    done: dict[str, bool] = {}
    kept = out.with_name(f".{out.name}.kept")
    try:
        with out.open("r+b") as file:
            good = 0
            for text in file:
                if not text.endswith(b"\n"):
                    break
                try:
                    answer = json.loads(text)
                    custom_id = answer["custom_id"]
                    done[custom_id] = (answer["response"] or {}).get("status_code") == 200
                except (ValueError, LookupError, TypeError):
                    raise ConfigError(f"--out {out} exists, and is no file of answers; name another one") from None
                good += len(text)
            file.truncate(good)
        if retry_failed and not all(done.values()):
            with out.open("rb") as file, kept.open("wb") as fresh:
                for text in file:
                    if (json.loads(text)["response"] or {}).get("status_code") == 200:
                        fresh.write(text)
                fresh.flush()
                os.fsync(fresh.fileno())
            os.replace(kept, out)
            done = {custom_id: good for custom_id, good in done.items() if good}
    except OSError as error:
        raise ConfigError(f"--out {out} can't be used: {error.strerror}") from error
    return done


class _Started:
    """A server of our own, on this machine alone.

    Args:
        arguments: of `serve`.
    """

    def __init__(self, arguments: list[str]) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        fixed = ["--host", "127.0.0.1", "--http-port", str(port), "--grpc-port", "0"]
        print("starting the server", file=sys.stderr)
        # A group of its own: Ctrl-C is this command's to answer.
        self._process = subprocess.Popen(  # noqa: S603 (our own command)
            [sys.executable, "-m", "kserve_vllm", "serve", *arguments, *fixed], stdout=sys.stderr, process_group=0
        )

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._process.poll() is not None

    def wait_ready(self) -> bool:
        """Wait until it is ready; False where it ends before that."""
        while not self.ended:
            try:
                if httpx.get(self.url + "/v2/health/ready", timeout=5).status_code == 200:
                    return True
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        print(f"the server did not start: it ended with code {self._process.returncode}", file=sys.stderr)
        return False

    def stop(self) -> None:
        """End it."""
        if not self.ended:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(90)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class _NobodyThere(Exception):
    """Nothing has answered for too long, or the server that was started is gone."""


class _Work:
    """Sends the requests."""

    def __init__(
        self,
        args: argparse.Namespace,
        server: _Started | None,
        key: str | None,
        file: IO[bytes],
        total: int,
        done: dict[str, bool],
    ) -> None:
        self._args = args
        self._server = server
        self._base = str(args.url).rstrip("/").removesuffix("/v1") if server is None else server.url
        self._headers = {"x-priority": args.priority, **({"authorization": f"Bearer {key}"} if key else {})}
        self._file = file
        self._total = total
        self._done = done
        self._before = len(done)
        self._failed = sum(not good for good in done.values())
        self._began = self._heard_at = time.monotonic()
        self._silence = ""  # why the last request had no answer at all
        self._answers: asyncio.Queue[Line | None] = asyncio.Queue()

    async def run(self, source: Path) -> int:
        """Answer all; an exit code."""
        limits = httpx.Limits(max_connections=self._args.concurrency)
        timeout = httpx.Timeout(self._args.give_up_after, connect=10.0)
        lines = (line for _, line in _objects(source))
        async with httpx.AsyncClient(
            base_url=self._base, headers=self._headers, timeout=timeout, limits=limits
        ) as http:
            writing = asyncio.create_task(self._write())
            saying = asyncio.create_task(self._say())
            sending = [asyncio.create_task(self._send(http, lines)) for _ in range(self._args.concurrency)]
            answering = asyncio.gather(*sending)
            try:
                waiting: set[asyncio.Future[Any]] = {answering, writing}
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    each.result()
            except OSError as error:
                raise ConfigError(f"--out can't be written: {error.strerror}; what is in it is kept") from error
            except _NobodyThere as error:
                print(f"\n{error}; the same command goes on from here", file=sys.stderr)
                return NO_SERVER
            finally:
                answering.cancel()
                await asyncio.gather(answering, *sending, return_exceptions=True)
                self._answers.put_nowait(None)
                saying.cancel()
                await asyncio.gather(writing, saying, return_exceptions=True)
                self._tell(last=True)
        return OK

    async def _send(self, http: httpx.AsyncClient, lines: Iterator[Line]) -> None:
        """Send one request after another."""
        for line in lines:
            if line["custom_id"] not in self._done:
                self._answers.put_nowait(await self._ask(http, line))

    async def _ask(self, http: httpx.AsyncClient, line: Line) -> Line:
        request_id, pause = f"batch_req_{uuid.uuid4().hex}", 0.5
        while True:
            try:
                response = await http.post(line["url"], json=line["body"], headers={"x-request-id": request_id})
                self._heard_at, self._silence = time.monotonic(), ""
                if response.status_code not in _AGAIN:
                    break
                given = response.headers.get("retry-after", "")
                wait_s = float(given) if given.isdigit() else pause
            except httpx.TransportError as error:
                wait_s, self._silence = pause, str(error) or type(error).__name__
                if self._server is not None and self._server.ended:
                    raise _NobodyThere("the server has ended") from error
                if time.monotonic() - self._heard_at > self._args.give_up_after:
                    raise _NobodyThere(f"nothing answers at {self._base}: {error!r}") from error
            await asyncio.sleep(min(_PAUSE_MAX_S, max(wait_s, 0.1)))
            pause = min(_PAUSE_MAX_S, pause * 2)
        try:
            body = response.json()
        except ValueError:
            body = {"error": {"message": response.text[:1000], "type": None, "param": None, "code": None}}
        request_id = response.headers.get("x-request-id", request_id)
        answer = {"status_code": response.status_code, "request_id": request_id, "body": body}
        return {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": line["custom_id"],
            "response": answer,
            "error": None,
        }

    async def _write(self) -> None:
        """Keep answers as they come, several at once where the disk is slow."""
        while True:
            answers = [await self._answers.get()]
            while not self._answers.empty():
                answers.append(self._answers.get_nowait())
            found = [each for each in answers if each is not None]
            await asyncio.to_thread(self._keep, found)
            for each in found:
                good = each["response"]["status_code"] == 200
                self._done[each["custom_id"]] = good
                self._failed += not good
            if None in answers:
                return

    def _keep(self, answers: list[Line]) -> None:
        self._file.write(b"".join(json.dumps(each).encode() + b"\n" for each in answers))
        self._file.flush()
        os.fsync(self._file.fileno())

    async def _say(self) -> None:
        while True:
            await asyncio.sleep(_ON_A_TERMINAL_EVERY_S if sys.stderr.isatty() else _SAY_EVERY_S)
            self._tell()

    def _tell(self, last: bool = False) -> None:
        """How far it is, on one line of a terminal, else on a line each time."""
        here = len(self._done) - self._before
        rate = here / max(1e-6, time.monotonic() - self._began)
        left = f", {_duration((self._total - len(self._done)) / rate)} left" if rate and not last else ""
        text = f"{len(self._done)}/{self._total} requests, {self._failed} failed, {rate:.1f}/s{left}"
        text += f"; {self._base} does not answer: {self._silence}" if self._silence and not last else ""
        terminal = sys.stderr.isatty()
        print(
            f"\r\x1b[K{text}" if terminal else text,
            end="" if terminal and not last else "\n",
            file=sys.stderr,
            flush=True,
        )


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
