"""Forms, which are parsed on the event loop as their bodies come."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request

from kserve_vllm.core.errors import InvalidRequest
from kserve_vllm.protocols.http import bounds
from tests.robustness.test_places import middleware
from tests.support import Routed

UPLOAD = "/v1/files"


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data; boundary=b; charset=punycode",
        "multipart/form-data; boundary=b; CHARSET=utf-7",
        "multipart/form-data; charset = idna; boundary=b",
        "multipart/form-data; boundary=b; charset*=utf-8''idna",
        "multipart/form-data; boundary=b; charset*0=id; charset*1=na",
        "multipart/form-data; boundary=b; charset=utf-8; charset=idna",
        "multipart/form-data; boundary=b; charset=utf-8idna",
        'multipart/form-data; boundary=b; charset="utf-7"',
        "multipart/form-data; boundary=b;charset=",
    ],
)
def test_a_form_names_no_codec(content_type: str) -> None:
    with pytest.raises(InvalidRequest, match="UTF-8"):
        bounds.check_form(content_type.encode())


@pytest.mark.parametrize("parameter", ["", "; charset=utf-8", ';charset="UTF-8"', "; charset=utf-8 "])
def test_a_form_may_say_that_it_is_utf_8(parameter: str) -> None:
    bounds.check_form(f"multipart/form-data; boundary=b{parameter}".encode())
    bounds.check_form(f"multipart/form-data{parameter}; boundary=b".encode())


def test_all_else_has_its_turn_while_a_large_form_is_parsed() -> None:
    content = b"\r" * (900 << 10)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    body = head + content + b"\r\n--b--\r\n"
    turns: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def noted() -> Any:
            message = await receive()
            turns.append("piece")
            assert len(message["body"]) <= bounds.PIECE
            return message

        async with Request(scope, noted).form() as form:
            found = form["file"]
            assert not isinstance(found, str)
            said = json.dumps(found.size).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": said})

    async def ask() -> list[Any]:
        edge = middleware()
        edge.attach(Routed(app, UPLOAD), Routed(app, UPLOAD))
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        async def others() -> None:
            while True:
                turns.append("other")
                await asyncio.sleep(0)

        beside = asyncio.create_task(others())
        headers = [
            (b"content-type", b"multipart/form-data; boundary=b"),
            (b"content-length", str(len(body)).encode()),
        ]
        await edge({"type": "http", "method": "POST", "path": UPLOAD, "headers": headers}, receive, send)
        beside.cancel()
        return sent

    sent = asyncio.run(ask())
    assert json.loads(sent[1]["body"]) == len(content)
    first, last = turns.index("piece"), len(turns) - turns[::-1].index("piece")
    assert turns[first:last].count("piece") == -(-len(body) // bounds.PIECE)
    assert turns[first:last].count("other") >= turns[first:last].count("piece") - 1
