"""Read the names of flags and variables out of other engines' own parsers, for the tests of the chart.

Usage: python tests/tools/read_engine_flags.py FOLDER    write tests/charts/engine_flags.json anew

FOLDER has, as far as there: `sglang` and `lmdeploy` (the unpacked wheels), `llama.cpp` (its source), and the
repositories `text-generation-inference`, `triton` (triton-inference-server/server) and `ollama`. An engine without
its folder keeps what the file has. Names alone are kept.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

FLAGS = Path(__file__).resolve().parents[1] / "charts" / "engine_flags.json"


def _text(paths: Iterable[Path]) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(paths))


def sglang(folder: Path) -> set[str]:
    """Fields are flags: `tp_size: A[...]` is --tp-size. Metrics are named in the collector."""
    fields = _text((folder / "sglang/srt/arg_groups/fields").glob("*.py"))
    names = {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): A\[", fields, re.MULTILINE)}
    for aliases in re.findall(r"aliases=\[(.*?)\]", fields, re.DOTALL):
        names |= set(re.findall(r'"(--[\w-]+)"', aliases))
    names |= set(re.findall(r'"(--[\w-]+)"', _text([folder / "sglang/srt/server_args.py"])))
    return names | set(re.findall(r'"(sglang:\w+)"', _text((folder / "sglang/srt/observability").glob("*.py"))))


def lmdeploy(folder: Path) -> set[str]:
    """argparse in the command line, prometheus_client in the loggers."""
    names = set(re.findall(r"'(--[a-z][\w-]*)'", _text((folder / "lmdeploy/cli").glob("*.py"))))
    # The model is a positional word of the server's own command; this name is the chart's.
    return names | set(re.findall(r"'(lmdeploy:\w+)'", _text((folder / "lmdeploy/metrics").glob("*.py"))))


def tgi(folder: Path) -> set[str]:
    """The launcher's reference, which its own test compares with `--help`, and the table of metrics."""
    reference = folder / "docs/source/reference"
    text = _text([reference / "launcher.md"])
    names = set(re.findall(r"^ +(?:-\w, )?(--[\w-]+)", text, re.MULTILINE)) | set(re.findall(r"\[env: (\w+)=", text))
    return names | {"-p"} | set(re.findall(r"`(tgi_\w+)`", _text([reference / "metrics.md"])))


def triton(folder: Path) -> set[str]:
    """The table of options, and the metrics of the user guide."""
    options = re.findall(r'\{\s*OPTION_\w+,\s*"([\w-]+)"', _text([folder / "src/command_line_parser.cc"]))
    metrics = re.findall(r"`(nv_\w+)`", _text([folder / "docs/user_guide/metrics.md"]))
    return {f"--{name}" for name in options} | set(metrics)


def llama_cpp(folder: Path) -> set[str]:
    """common/arg.cpp lists every spelling; the server's metrics are written in tools/server."""
    text = _text([folder / "common/arg.cpp"])
    names = set(re.findall(r'"(--?[A-Za-z][\w-]*)"', text)) | set(re.findall(r'"(LLAMA_\w+)"', text))
    server = _text((folder / "tools/server").glob("*.cpp"))
    described = re.findall(r'^ +"([a-z_]+)",$', server, re.MULTILINE)
    return names | {f"llamacpp:{name}" for name in described}


def ollama(folder: Path) -> set[str]:
    """It is set up by its environment alone."""
    return set(re.findall(r'"(OLLAMA_\w+)"', _text([folder / "envconfig/config.go"])))


READERS: dict[str, tuple[str, Callable[[Path], set[str]]]] = {
    "sglang": ("sglang", sglang),
    "lmdeploy": ("lmdeploy", lmdeploy),
    "tgi": ("text-generation-inference", tgi),
    "triton": ("triton", triton),
    "llama-cpp": ("llama.cpp", llama_cpp),
    "ollama": ("ollama", ollama),
}


def main(arguments: list[str]) -> int:
    """Write the file; returns 0, or 2 where no folder is named."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print(__doc__, file=sys.stderr)
        return 2
    known: dict[str, list[str]] = json.loads(FLAGS.read_text()) if FLAGS.exists() else {}
    for engine, (name, read) in READERS.items():
        folder = Path(arguments[0]) / name
        if folder.is_dir():
            known[engine] = sorted(read(folder))
        print(f"{engine}: {len(known.get(engine, []))} names{'' if folder.is_dir() else ' (as before)'}")
    FLAGS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
