"""What the headers of a gRPC call say about it, before any of its messages is read: who asks, and whether in vain.

The same for our own server, which then reads nothing of a call that is refused, and for the grpcio package's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

Metadata = Sequence[tuple[str, str | bytes]]
"""Names and values; bytes where the name ends in `-bin`."""


@dataclass(frozen=True)
class Screened:
    """What was found.

    Attributes:
        owner: whose messages the call brings, as one word for a caller; None where no keys are asked for.
        keyless: whether the call is answered without a key, as health and reflection are.
        refusal: status, sentence and trailing metadata to refuse the call with, or None.
    """

    owner: str | None = None
    keyless: bool = False
    refusal: tuple[grpc.StatusCode, str, Metadata] | None = None


ADMITTED = Screened()
KEYLESS = Screened(keyless=True)
