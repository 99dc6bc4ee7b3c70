"""What policies and accounting hang on to in vLLM."""
