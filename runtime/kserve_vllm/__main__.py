"""`python -m kserve_vllm` is the `kserve-vllm` command."""

from kserve_vllm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
