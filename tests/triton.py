"""Triton's gRPC client in the process that also holds kserve.

Both libraries declare the protobuf package `inference` in protobuf's one default pool, where the second one fails.
Here Triton's is imported into a pool of its own.
"""

from __future__ import annotations

from unittest import mock

from google.protobuf import descriptor_pool

_pool = descriptor_pool.DescriptorPool()
with mock.patch.object(descriptor_pool, "Default", return_value=_pool):
    import tritonclient.grpc as client
    from tritonclient.grpc import aio, service_pb2, service_pb2_grpc

__all__ = ["aio", "client", "service_pb2", "service_pb2_grpc"]
