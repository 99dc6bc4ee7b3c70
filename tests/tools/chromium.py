"""Debian's Chromium for the tests: get it, start it without a screen, and drive it over the DevTools protocol.

Usage: python -m tests.tools.chromium     (installs it as root; where it can't be had, says loudly what is skipped)

Source of the protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

_STARTS_WITHIN_S = 120.0


def find() -> str | None:
    """Path of the browser."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def main() -> int:
    """Install it where it is missing. Returns 0."""
    if find():
        return 0
    try:
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            raise OSError("it takes apt-get and root")
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        print("installing Debian's chromium ...", flush=True)
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", *command], check=True, stdout=subprocess.DEVNULL, env=environ, timeout=600)
    except (subprocess.SubprocessError, OSError) as error:
        line = "!" * 78
        print(f"{line}\nchromium can't be had: {error}\nThe test of /ui WILL BE SKIPPED.\n{line}", file=sys.stderr)
    return 0


class Browser:
    """One page in a browser of its own, as a context.

    Args:
        binary: from `find`.
        width, height: of the page, pixels.
    """

    def __init__(self, binary: str, width: int = 1180, height: int = 900) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kserve-vllm-chromium-", ignore_cleanup_errors=True)
        self._log = Path(self._folder.name) / "log"
        # As root it has no sandbox; it shows nothing but our own page.
        command = [
            binary,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-extensions",
            "--force-prefers-reduced-motion",
            f"--window-size={width},{height}",
            "--remote-debugging-port=0",
            f"--user-data-dir={self._folder.name}/profile",
            "about:blank",
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self.events: list[dict[str, Any]] = []
        self._number = 0
        self._open = contextlib.ExitStack()
        try:
            wire = connect(self._page_socket(), max_size=64 << 20, open_timeout=60)
            self._socket = self._open.enter_context(wire)
        except BaseException:
            self.close()
            raise
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _page_socket(self) -> str:
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while time.monotonic() < deadline:
            found = re.search(r"DevTools listening on ws://(127\.0\.0\.1:\d+)/", self._log.read_text(errors="replace"))
            if found:
                pages = httpx.get(f"http://{found[1]}/json/list", timeout=30).json()
                for page in pages:
                    if page["type"] == "page":
                        return str(page["webSocketDebuggerUrl"])
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"chromium did not start:\n{self._log.read_text(errors='replace')[-3000:]}")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        self._open.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol; events that come meanwhile are kept in `events`."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def value(self, expression: str) -> Any:
        """What an expression comes to in the page."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str, within_s: float = 60.0) -> None:
        """Wait until an expression is true in the page."""
        deadline = time.monotonic() + within_s
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"not within {within_s:g} s: {expression}"
            time.sleep(0.1)

    def picture(self) -> bytes:
        """The page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


if __name__ == "__main__":
    raise SystemExit(main())
