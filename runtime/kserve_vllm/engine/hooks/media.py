"""Where images, audio and video are fetched from that a request names by a URL: from the public internet, and from what
the operator has named.

vLLM fetches from any host that this pod reaches. A client would reach through it what it can't reach itself: the
cloud's metadata, this pod's own admin port, other services of the cluster. Addresses are looked at when they are
connected to, so that neither a name that resolves to one inside, nor a redirect, nor one that changes its mind gets by.

Written against vLLM 0.32 and aiohttp 3.14.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Collection
from typing import TYPE_CHECKING, NoReturn
from urllib.request import getproxies

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.abc import ResolveResult
    from aiohttp.connector import AddrInfoType
    from vllm.connections import HTTPConnection

log = logging.getLogger(__name__)

_EMBEDS = ipaddress.ip_network("64:ff9b::/96")
"""Addresses of IPv4 behind NAT64: RFC 6052, 2.1."""


def is_outside(address: str) -> bool:
    """Whether an IP address is one of the public internet."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = (
            ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _EMBEDS else None)
        )
        ip = inner or ip
    return ip.is_global and not ip.is_multicast


def fetch_from_outside(connection: HTTPConnection, named: Collection[str]) -> None:
    """Let a connection of vLLM's fetch from the public internet and from some hosts alone.

    Where fetching goes through a proxy (`HTTP_PROXY`, `HTTPS_PROXY`), what that reaches is for the proxy to decide.

    Args:
        connection: its clients are replaced.
        named: hosts (`--allowed-media-domains`) that may be inside.
    """
    if {"http", "https", "all"} & getproxies().keys():
        log.info("media that requests name by a URL are fetched through a proxy, which decides what it reaches")
        return
    clients: list[aiohttp.ClientSession] = []

    async def get_async_client() -> aiohttp.ClientSession:
        if not clients:
            clients.append(_client(frozenset(name.lower() for name in named)))
        return clients[0]

    def get_sync_client() -> NoReturn:
        raise NotImplementedError("media are fetched by the event loop alone")

    connection.get_async_client, connection.get_sync_client = get_async_client, get_sync_client


def _client(named: frozenset[str]) -> aiohttp.ClientSession:
    import aiohttp
    from vllm.exceptions import VLLMValidationError

    inside: set[str] = set()
    """Addresses of those that are named."""

    def check(address: str, host: str) -> None:
        if not is_outside(address) and address not in inside:
            raise VLLMValidationError(
                f"nothing is fetched from {host}, which is not on the public internet; send the medium itself, as a "
                "data URL, or have the host named by --allowed-media-domains"
            )

    class MediaNames(aiohttp.ThreadedResolver):
        """Looks up names, but for those of hosts inside."""

        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            found = await super().resolve(host, port, family)
            for each in found:
                if host.lower().rstrip(".") in named:
                    inside.add(each["host"])
                check(each["host"], host)
            return found

    def connect(info: AddrInfoType) -> socket.socket:
        """A socket for an address, which may have come without a name."""
        family, kind, protocol, _, address = info
        if str(address[0]) in named:
            inside.add(str(address[0]))
        check(str(address[0]), str(address[0]))
        return socket.socket(family, kind, protocol)

    return aiohttp.ClientSession(
        trust_env=True, connector=aiohttp.TCPConnector(resolver=MediaNames(), socket_factory=connect)
    )
