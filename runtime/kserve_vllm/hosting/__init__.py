"""What exists because of KServe: the model class, its data plane, and the HTTP and gRPC servers."""
