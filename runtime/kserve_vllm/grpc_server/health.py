"""The standard gRPC health service, `grpc.health.v1.Health`.

The one of the grpcio-health-checking package writes to a watcher while it holds the lock that a change needs, so that
one watcher who reads nothing keeps all others at the status of before.
Source: grpc/grpc, `doc/health-checking.md`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Answer = health_pb2.HealthCheckResponse
if TYPE_CHECKING:
    _Context: TypeAlias = grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Tells whether services answer, to those who ask and to those who watch."""

    def __init__(self) -> None:
        self._statuses: dict[str, health_pb2.HealthCheckResponse.ServingStatus] = {}
        self._watchers: set[asyncio.Event] = set()

    def set(self, names: Iterable[str], serving: bool) -> None:
        """Set the status of services; "" is the whole server."""
        self._statuses.update(dict.fromkeys(names, _Answer.SERVING if serving else _Answer.NOT_SERVING))
        for changed in self._watchers:
            changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: _Context) -> health_pb2.HealthCheckResponse:
        """The status of a service now."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return _Answer(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status of a service now, and each time it is another one."""
        changed, last = asyncio.Event(), None
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                status = self._statuses.get(request.service, _Answer.SERVICE_UNKNOWN)
                if status != last:
                    last = status
                    yield _Answer(status=status)
                await changed.wait()
        finally:
            self._watchers.discard(changed)
