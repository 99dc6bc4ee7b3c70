"""The way of common OpenAI requests past vLLM's web framework."""
