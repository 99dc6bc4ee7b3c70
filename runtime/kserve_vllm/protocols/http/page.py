"""The page at `/ui`: three files of the package, with headers that let it load and ask nothing but its own origin.

It holds no secret and is answered to everyone who reaches the port, as metrics are; what it asks, it asks with the key
that its visitor types in. Content Security Policy Level 3: no inline script or style, no frame, no form, no other
origin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
)
_FILES = {
    "/ui": ("index.html", b"text/html; charset=utf-8"),
    "/ui/app.js": ("app.js", b"text/javascript; charset=utf-8"),
    "/ui/style.css": ("style.css", b"text/css; charset=utf-8"),
}
PATHS = frozenset(_FILES)


@dataclass(frozen=True, slots=True)
class Asset:
    """One file.

    Attributes:
        body: its bytes.
        headers: of the answer, but its length.
    """

    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]


def load() -> Mapping[str, Asset]:
    """The files by path."""
    folder = files("kserve_vllm.protocols.http") / "ui"
    return {
        path: Asset((folder / name).read_bytes(), ((b"content-type", kind), *_HEADERS))
        for path, (name, kind) in _FILES.items()
    }
