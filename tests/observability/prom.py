"""A real Prometheus server that reads the runtime, with the chart's rules."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.clients import until
from tests.support import Server, free_port

# As NVIDIA's exporter writes them (dcgm-exporter 4, its default counters), for a pod of ours; there is no GPU here.
DCGM = """\
# HELP DCGM_FI_DEV_GPU_UTIL GPU utilization (in %).
# TYPE DCGM_FI_DEV_GPU_UTIL gauge
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-1",container="kserve-container",namespace="test",pod="stable"} 71
# HELP DCGM_FI_DEV_FB_FREE Framebuffer memory free (in MiB).
# TYPE DCGM_FI_DEV_FB_FREE gauge
DCGM_FI_DEV_FB_FREE{gpu="0",UUID="GPU-1",container="kserve-container",namespace="test",pod="stable"} 8100
# HELP DCGM_FI_DEV_FB_USED Framebuffer memory used (in MiB).
# TYPE DCGM_FI_DEV_FB_USED gauge
DCGM_FI_DEV_FB_USED{gpu="0",UUID="GPU-1",container="kserve-container",namespace="test",pod="stable"} 73000
"""


class Pages:
    """Serves the pages that a second pod and a GPU exporter would have.

    `/canary` is the server's own page with a later start of the process: a canary beside the stable revision.
    """

    def __init__(self, server: Server) -> None:
        # A client reads the machine's certificates when it is made, which takes longer than a request.
        client = self._client = httpx.Client(timeout=10)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kind = "text/plain; version=0.0.4"
                if self.path == "/canary":
                    accept = {"accept": self.headers.get("accept", "")}
                    answer = client.get(server.url + "/metrics", headers=accept)
                    kind, text = answer.headers["content-type"], answer.text
                    text = re.sub(r"^(process_start_time_seconds) \S+", r"\1 9e9", text, flags=re.M)
                else:
                    text = DCGM
                self.send_response(200)
                self.send_header("content-type", kind)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Close the port."""
        self._http.shutdown()
        self._http.server_close()
        self._client.close()


class Prometheus:
    """Prometheus on loopback, scraping and evaluating every second.

    Args:
        binary: path of `prometheus`.
        folder: for its files.
        server: what it reads, as the pods `stable` and `canary` of service `demo` in namespace `test`.
        rules: rule files.
    """

    def __init__(self, binary: str, folder: Path, server: Server, rules: Sequence[Path]) -> None:
        self._pages = Pages(server)
        self._client = httpx.Client(timeout=30)
        labels = {"namespace": "test", "inferenceservice": "demo"}
        stable = {**labels, "pod": "stable", "revision": "demo-00001"}
        canary = {**labels, "pod": "canary", "revision": "demo-00002"}

        def job(name: str, path: str, target: str, more: dict[str, str]) -> dict[str, Any]:
            return {
                "job_name": name,
                "metrics_path": path,
                "honor_labels": name == "dcgm",
                "static_configs": [{"targets": [target], "labels": more}],
            }

        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(path) for path in rules],
            "scrape_configs": [
                job("stable", "/metrics", f"127.0.0.1:{server.http_port}", stable),
                job("canary", "/canary", self._pages.address, canary),
                job("dcgm", "/dcgm", self._pages.address, {}),
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.at: float | None = None
        """When queries are evaluated, in seconds of the wall clock; now where it is None."""
        self._log = (folder / "log").open("w+")
        self._process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        until(self._up, 30)

    def _up(self) -> bool:
        assert self._process.poll() is None, Path(self._log.name).read_text()
        try:
            return self._client.get(self.url + "/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def get(self, path: str, **parameters: Any) -> Any:
        """The data of an API answer, which must succeed."""
        body = self._client.get(f"{self.url}/api/v1/{path}", params=parameters).json()
        assert body["status"] == "success", body
        return body["data"]

    def query(self, expression: str) -> list[Any]:
        """The series of an instant query that have a number."""
        at = {} if self.at is None else {"time": self.at}
        data = self.get("query", query=expression, **at)
        rows = data["result"] if data["resultType"] == "vector" else [{"value": data["result"]}]
        return [row for row in rows if row["value"][1] != "NaN"]

    def stop(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._client.close()
        self._pages.stop()
