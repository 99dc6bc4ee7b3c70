"""What is compiled while a server starts, tried out: so that an image is checked when it is built, not when it starts.

On a CPU torch.compile writes C++, which wants a compiler and Python's headers. On a GPU Triton compiles a launcher in C
for its kernels, against Python's headers and CUDA's, whatever the kernels themselves are made with; that can be tried
without a GPU.

    python -m kserve_vllm.engine.compilers cpu|gpu
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

_COMPILERS = ("g++", "c++", "clang++")
_C_COMPILERS = ("cc", "gcc", "clang")
_LAUNCHER = """
#include <Python.h>
#include <cuda.h>
static CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                          void **, void **);
int main(void) { return launch == 0 && PY_MAJOR_VERSION == 3 ? 0 : 1; }
"""


def missing_for_cpu(environ: Mapping[str, str] = os.environ) -> str | None:
    """What torch.compile lacks on a CPU, as a part of a sentence; None where nothing is lacking."""
    given = shlex.split(environ.get("CXX", ""))
    if not any(shutil.which(each) for each in (*given[:1], *_COMPILERS)):
        return "no C++ compiler is installed"
    if not (python_headers() / "Python.h").is_file():
        return f"Python's headers are not installed ({python_headers() / 'Python.h'})"
    return None


def check_cpu() -> None:
    """Compile a function with torch and run it.

    Raises:
        RuntimeError: it can't be compiled, or computes something else.
    """
    lacking = missing_for_cpu()
    if lacking is not None:
        raise RuntimeError(lacking)
    import torch

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * 2 + x.sum()

    given = torch.arange(64, dtype=torch.float32) - 32
    made = torch.compile(function, fullgraph=True)(given)
    if not torch.allclose(made, function(given)):
        raise RuntimeError("what torch.compile has made computes something else")


def check_gpu() -> None:
    """Compile what Triton's launchers are made of, with the compiler and the headers that Triton would take.

    Raises:
        RuntimeError: it can't be compiled.
    """
    import triton  # type: ignore[import-not-found]

    compiler = next(
        (found for each in (os.environ.get("CC", ""), *_C_COMPILERS) if (found := shutil.which(each))), None
    )
    if compiler is None:
        raise RuntimeError("no C compiler is installed, which Triton needs for its launchers")
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "launcher.c"
        source.write_text(_LAUNCHER)
        command = [
            compiler,
            str(source),
            "-c",
            "-fPIC",
            f"-I{python_headers()}",
            f"-I{folder}",
            "-o",
            f"{place}/launcher.o",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"Triton's launchers can't be compiled: {done.stderr.strip()}")


def python_headers() -> Path:
    """The folder that holds Python.h, if it was installed."""
    return Path(sysconfig.get_paths()["include"])


def main() -> int:
    """Try what the image of this kind compiles at run time."""
    checks = {"cpu": check_cpu, "gpu": check_gpu}
    if len(sys.argv) != 2 or sys.argv[1] not in checks:
        print(f"usage: python -m kserve_vllm.engine.compilers {'|'.join(checks)}", file=sys.stderr)
        return 2
    try:
        checks[sys.argv[1]]()
    except RuntimeError as error:
        print(f"this image can't compile at run time: {error}", file=sys.stderr)
        return 1
    print("what is compiled at run time can be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
