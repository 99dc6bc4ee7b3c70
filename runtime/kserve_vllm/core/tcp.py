"""What the kernel knows of a TCP connection and the event loop does not say while nothing is read."""

from __future__ import annotations

import asyncio
import socket
import sys

CLOSE, CLOSE_WAIT = 7, 8
"""Of a connection that was reset, and of one whose client has ended its side: Linux' net/tcp_states.h."""


def state(transport: asyncio.BaseTransport) -> int | None:
    """The kernel's state of a connection, or None where it does not tell (another system, no socket)."""
    sock = transport.get_extra_info("socket")
    if sock is None or sys.platform != "linux":
        return None
    try:
        found: int = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except OSError:
        return None
    return found
