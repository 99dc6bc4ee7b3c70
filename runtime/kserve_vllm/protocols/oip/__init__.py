"""The Open Inference Protocol V2: tensors, text, generate and gRPC."""
