"""Shorter ways through vLLM, each of which falls back by itself."""
