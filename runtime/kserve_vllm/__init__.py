"""kserve-vllm: a KServe serving runtime for vLLM. Importing the package does nothing."""
