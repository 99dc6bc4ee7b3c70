"""`bench`, `top` and the page at `/ui`, on the real server with the demo model.

`UPDATE_PICTURES=1` writes what the page looks like into docs/pictures/ui.png.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import httpx
import pytest

from kserve_vllm.cli import command as cli
from kserve_vllm.ops.bench.clients import OVER_GRPC, PROTOCOLS, STREAMED
from kserve_vllm.protocols.http import page
from tests.support import ROOT, Server, not_checked
from tests.tools import chromium

PICTURE = ROOT / "docs" / "pictures" / "ui.png"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_is_measured(server: Server, protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"grpc://{server.grpc_address}" if protocol in OVER_GRPC else server.url
    words = ["--protocol", protocol, "--concurrency", "2", "--requests", "4", "--prompt", "40", "--output", "6"]
    assert cli.main(["bench", url, *words, "--warmup", "0", "-q", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["results"]
    assert found["model"] == "demo"
    assert (row["completed"], row["failed"], row["total_output_tokens"]) == (4, 0, 24), row["errors"]
    assert row["total_input_tokens"] == pytest.approx(4 * 40, rel=0.25)
    assert row["median_e2el_ms"] > 0
    assert (row["median_ttft_ms"] is not None) == (protocol in STREAMED)


def test_top_reads_a_server(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", server.url, "--once", "--json", "--interval", "0.3"]) == 0
    total = json.loads(capsys.readouterr().out)["total"]
    assert total["state"] == "ready"
    assert total["pods"] == [1, 1]
    for name in ("running", "waiting", "kv_used", "requests_per_s", "output_per_s", "in_flight"):
        assert total[name] is not None, name


def test_the_page_may_load_nothing_but_itself(server: Server) -> None:
    for path in page.PATHS:
        answer = httpx.get(server.url + path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        plain = httpx.head(server.url + path, headers={"accept-encoding": "identity"})
        assert plain.headers["content-length"] == str(len(answer.content))
    assert httpx.get(server.url + "/ui/", follow_redirects=False).status_code == 200
    assert httpx.get(server.url + "/ui/other.js").status_code == 404


def test_the_page_shows_figures_and_chats(server: Server, tmp_path: Path) -> None:
    binary = chromium.find()
    if binary is None:
        not_checked("no chromium: the page at /ui was not looked at; see tests/tools/chromium.py")
    with chromium.Browser(binary) as browser:
        browser.call("Page.navigate", url=server.url + "/ui")
        browser.until("document.readyState === 'complete' && document.querySelector('#model')?.options.length")
        assert "demo" in browser.value("[...document.querySelectorAll('#model option')].map(o => o.value)")
        assert {"upper", "french"} <= set(
            browser.value("[...document.querySelectorAll('#adapter option')].map(o => o.value)")
        )
        browser.value("document.querySelector('#temperature').value = 0")
        for text, adapter in (("What is 17 + 25?", ""), ("Who wrote Hamlet?", "upper")):
            browser.value(
                f"document.querySelector('#adapter').value = {json.dumps(adapter)};"
                f"document.querySelector('#prompt').value = {json.dumps(text)};"
                "document.querySelector('#ask').requestSubmit()"
            )
            browser.until("!document.querySelector('#send').disabled")
        turns = browser.value("[...document.querySelectorAll('.turn')].map(t => [t.className, t.textContent])")
        assert [kind for kind, _ in turns] == ["turn user", "turn assistant"] * 2, turns
        assert all(text for _, text in turns)
        assert "first token after" in browser.value("document.querySelector('#speed').textContent")
        # Two readings later the answers are in the figures.
        browser.until("document.querySelector('#tile-first').textContent !== '-'")
        assert browser.value("document.querySelector('#state').className") == "ready"
        assert browser.value("document.querySelector('#tile-running').textContent") == "0"
        browser.until("document.querySelector('#tiles polyline').points.numberOfItems >= 3")
        picture = browser.picture()
        complaints = [
            event["params"]
            for event in browser.events
            if event["method"] == "Runtime.exceptionThrown"
            or (event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error")
        ]
        assert not complaints
        asked = {e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"}
        assert asked
        assert all(url.startswith((server.url + "/", "data:", "about:")) for url in asked), asked
        # What an answer could carry at worst does not run.
        browser.value("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
        assert browser.value("window.ran") is None
    assert 10_000 < len(picture) < 150_000
    if os.environ.get("UPDATE_PICTURES"):
        PICTURE.write_bytes(picture)
