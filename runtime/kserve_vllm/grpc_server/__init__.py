"""A gRPC server on HTTP/2; knows neither vLLM nor KServe."""
