"""boofuzz over V2's URLs and bodies: every answer is below 500, and the server is live after each."""

import sys

from boofuzz import (
    Block,
    Bytes,
    FuzzLoggerText,
    Group,
    Request,
    Session,
    Size,
    Static,
    String,
    Target,
    TCPSocketConnection,
)
from report import MODEL, URL, case, run

_HOST, _PORT = URL.removeprefix("http://").rsplit(":", 1)
_MOST = 400


def fuzz(request):
    """Send up to `_MOST` mutations of a request. Returns what was answered with a 5xx."""
    found = []

    def look(target, fuzz_data_logger, session, *args, **kwargs):
        answer = session.last_recv or b""
        if answer[:10].startswith((b"HTTP/1.1 5", b"HTTP/1.0 5")):
            found.append((session.total_mutant_index, answer[:200]))

    class Quiet(FuzzLoggerText):
        def _print_log_msg(self, *args, **kwargs):
            pass

    session = Session(
        target=Target(TCPSocketConnection(_HOST, int(_PORT), recv_timeout=20, send_timeout=20)),
        fuzz_loggers=[Quiet(file_handle=sys.stderr)],
        post_test_case_callbacks=[look],
        receive_data_after_fuzz=True,
        check_data_received_each_request=False,
        ignore_connection_reset=True,
        ignore_connection_aborted=True,
        web_port=None,
        index_end=_MOST,
        reuse_target_connection=False,
    )
    session.connect(request)
    session.fuzz()
    assert session.num_cases_actually_fuzzed > 100, session.num_cases_actually_fuzzed
    return found


def lines(*children):
    return [*children, Static("end", "\r\nHost: x\r\nConnection: close\r\n\r\n")]


@case
def urls():
    method = Group("method", values=["GET", "HEAD", "POST"])
    name = String("path", f"/v2/models/{MODEL}", max_len=4096)
    found = fuzz(Request("url", children=lines(method, Static("one", " "), name, Static("two", " HTTP/1.1"))))
    assert not found, found[:2]


@case
def names_of_models_and_versions():
    children = lines(
        Static("one", "GET /v2/models/"),
        String("name", MODEL, max_len=2048),
        Static("two", "/versions/"),
        String("version", "1", max_len=2048),
        Static("three", "/ready HTTP/1.1"),
    )
    found = fuzz(Request("names", children=children))
    assert not found, found[:2]


@case
def bodies():
    body = '{"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["a"]}], "parameters": '
    head = f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: "
    inner = Block(
        "body",
        children=[Static("open", body), Bytes("value", b'{"max_tokens": 1}', max_len=4096), Static("close", "}")],
    )
    children = [
        Static("head", head),
        Size("length", block_name="body", output_format="ascii", fuzzable=False),
        Static("gap", "\r\n\r\n"),
        inner,
    ]
    found = fuzz(Request("infer", children=children))
    assert not found, found[:2]


run()
