"""Sockets: the HTTP and gRPC listeners."""
