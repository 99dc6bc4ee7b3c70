"""The commands. The only reader of `sys.argv`."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The `kserve-vllm` command; returns its exit code."""
    from kserve_vllm.cli import command

    return command.main(argv)
