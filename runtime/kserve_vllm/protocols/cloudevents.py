"""CloudEvents on V1's predict, in binary and structured mode, as KServe's own server takes and answers them.

What an answer's event is called is set as there: by `CE_TYPE`, `CE_SOURCE` and `CE_MERGE`.
Source: CloudEvents 1.0, HTTP protocol binding and JSON format.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import orjson

from kserve_vllm.core.errors import InvalidRequest, UnsupportedMedia

_REQUIRED = ("specversion", "id", "source", "type")
_STRUCTURED = "application/cloudevents+json"
_ANY = "application/cloudevents"
_PREFIX = "ce-"


@dataclass(frozen=True)
class Event:
    """An event that a request came as.

    Attributes:
        attributes: by name, without `data`.
        binary: whether they stood in headers.
    """

    attributes: Mapping[str, object]
    binary: bool

    def answer(self, model: str, body: Mapping[str, object]) -> tuple[bytes, dict[str, str]]:
        """Body and headers of the answer, which is an event of the same mode."""
        from kserve.utils.utils import create_response_cloudevent

        now = datetime.now(UTC).isoformat()
        attributes = {"id": "", "time": now, **self.attributes} if _merges() else {}
        for name in ("datacontenttype", "dataschema"):
            attributes.pop(name, None)
        headers, answer = create_response_cloudevent(model, dict(body), attributes, self.binary)
        kind = "application/json" if self.binary else _STRUCTURED
        kept = {name: value for name, value in headers.items() if name.lower() != "content-type"}
        return answer, {**kept, "content-type": kind}


def event_of(body: bytes, headers: Mapping[str, str]) -> tuple[bytes, Event | None]:
    """The data of a request, and the event that it came as, if it is one.

    Args:
        body: of the request.
        headers: with lower-case names.

    Raises:
        InvalidRequest: an event lacks what it must have.
        UnsupportedMedia: there are several in one request, or one in another form than JSON.
    """
    kind = headers.get("content-type", "").split(";", 1)[0].strip().lower()
    if kind == _STRUCTURED:
        return _structured(body)
    if kind.startswith(_ANY):
        # CloudEvents' HTTP binding, 3.2 and 3.3: a batch that is not taken is answered 415.
        raise UnsupportedMedia(f"{kind[:64]} is not read here; send each event in a request, as {_STRUCTURED}")
    if f"{_PREFIX}specversion" in headers:
        attributes = {name.removeprefix(_PREFIX): value for name, value in headers.items() if name.startswith(_PREFIX)}
        _check(attributes)
        return body, Event(attributes, binary=True)
    return body, None


def _structured(body: bytes) -> tuple[bytes, Event]:
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the event is not valid JSON: {error}", field="body") from None
    if not isinstance(tree, dict):
        raise InvalidRequest("the event must be a JSON object", field="body")
    attributes = {name: value for name, value in tree.items() if name not in ("data", "data_base64")}
    _check(attributes)
    if "data" in tree:
        data = tree["data"]
        return (data.encode() if isinstance(data, str) else orjson.dumps(data)), Event(attributes, binary=False)
    try:
        return base64.b64decode(tree.get("data_base64", ""), validate=True), Event(attributes, binary=False)
    except (binascii.Error, TypeError, ValueError):
        raise InvalidRequest("data_base64 is not base64", field="data_base64") from None


def _check(attributes: Mapping[str, object]) -> None:
    for name in _REQUIRED:
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise InvalidRequest(f"the event's attribute {name} is missing", field=name)
    if attributes["specversion"] not in ("1.0", "0.3"):
        raise InvalidRequest("the event's specversion must be 1.0", field="specversion")


def _merges() -> bool:
    return os.environ.get("CE_MERGE", "").lower() == "true"
