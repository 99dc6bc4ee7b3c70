"""Write `lock-gpu.txt`: the pins that the GPU image needs beside those that vLLM's own image satisfies.

Usage: lock_gpu.py UV VLLM_VERSION   (called by `make lock`)

vLLM is resolved alone and together with `gpu.in`; what differs is what KServe adds or holds back. The rest of the
image stays as vLLM ships it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "requirements"
_PYTHON = "3.12"  # of vLLM's image
_PROJECT = """[project]
name = "gpu-image"
version = "0"
requires-python = ">=3.12,<3.13"
[tool.uv]
environments = ["sys_platform == 'linux' and platform_machine == 'x86_64'"]
"""


def resolve(uv: str, requirements: str) -> dict[str, str]:
    """Pins with hashes for Linux on x86-64, by `name==version`."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pyproject.toml").write_text(_PROJECT)
        Path(folder, "all.in").write_text(requirements)
        text = subprocess.run(
            [
                uv,
                "pip",
                "compile",
                "-q",
                "--universal",
                "--python-version",
                _PYTHON,
                "--no-annotate",
                "--no-header",
                "--generate-hashes",
                "all.in",
            ],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    pins = {}
    for block in re.split(r"\n(?=\S)", text.strip()):
        pins[block.split(" ", 1)[0]] = block
    return pins


def main() -> int:
    """Resolve twice and write the difference."""
    uv, version = sys.argv[1:]
    alone = resolve(uv, f"vllm=={version}\n")
    both = resolve(uv, f"vllm=={version}\n" + (FOLDER / "gpu.in").read_text())
    lines = [block for pin, block in both.items() if pin not in alone]
    (FOLDER / "lock-gpu.txt").write_text("\n".join(lines) + "\n")
    print(f"lock-gpu.txt: {len(lines)} of {len(both)} packages differ from vLLM's own")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
