"""The model of the engine that `plan` and `simulate` share: what memory holds, and how long a step takes.

Nothing here imports vLLM, torch or kserve: a laptop runs it. Every constant stands beside its unit and its source.
"""
