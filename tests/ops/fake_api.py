"""A fake Kubernetes API server: recorded objects over real HTTP, for the real client.

It keeps objects by path, lists, gets, creates, replaces and merges them, answers logs and pod proxies from what it was
given, and tells a test of each write. It knows no schemas, no admission and no controllers; what a controller would do
is done by the test, in `on_write`.
"""

from __future__ import annotations

import copy
import json
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from kserve_vllm.ops.cluster import KINDS, path_of
from kserve_vllm.ops.diagnose.snapshot import Snapshot
from tests.ops.snapshots import merge

TOKEN = "the-token-of-the-test"


class FakeApi:
    """The server, on loopback.

    Args:
        folder: where its kubeconfig goes.
        namespace: of the kubeconfig's context.
    """

    def __init__(self, folder: Path, namespace: str = "team-a") -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.forbidden: set[str] = set()
        self.missing: set[str] = set()
        self.logs: dict[str, str] = {}
        self.pages: dict[str, tuple[int, str]] = {}
        self.refusal: tuple[int, str] | None = None
        self.writes: list[tuple[str, str, Any]] = []
        self.reads: list[str] = []
        self.on_write: Callable[[str, str, Any], None] = lambda method, path, body: None
        self.evict_answer: Callable[[str], tuple[int, str]] = lambda pod: (201, "")
        self.post_to_pod: Callable[[str, Any], tuple[int, Any]] = lambda path, body: (404, {})
        self._version = 100
        self.lock = threading.RLock()
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # an answer waits 40 ms behind its head otherwise

            def _any(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                raw = self.rfile.read(length)
                body = json.loads(raw) if raw and raw != b"null" else None
                scheme, _, token = (self.headers.get("authorization") or "").partition(" ")
                # The scheme's case is free, and in a pod the client writes it small.
                if (scheme.lower(), token) != ("bearer", TOKEN):
                    status, answer = 401, api.status(401, "Unauthorized")
                else:
                    with api.lock:
                        status, answer = api.answer(self.command, self.path, body)
                text = answer if isinstance(answer, str) else json.dumps(answer)
                self.send_response(status)
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any

            def log_message(self, *_: Any) -> None:
                pass

        self._handler = Handler
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._others: list[ThreadingHTTPServer] = []
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "clusters": [{"name": "test", "cluster": {"server": self.url}}],
                    "users": [{"name": "test", "user": {"token": TOKEN}}],
                    "contexts": [
                        {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}
                    ],
                }
            )
        )

    def stop(self) -> None:
        """Close the ports."""
        for server in (self._http, *self._others):
            server.shutdown()
            server.server_close()

    def over_tls(self, certificate: Path, key: Path) -> int:
        """A second port, with TLS; gives its number."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self._others.append(server)
        return int(server.server_address[1])

    def put(self, kind: str, obj: dict[str, Any], namespace: str = "team-a") -> None:
        """Keep an object."""
        with self.lock:
            self._version += 1
            obj = copy.deepcopy(obj)
            if KINDS[kind][1]:
                obj["metadata"].setdefault("namespace", namespace)
            obj["metadata"]["resourceVersion"] = str(self._version)
            where = path_of(kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
            self.objects[where] = obj

    def get(self, kind: str, name: str, namespace: str = "team-a") -> dict[str, Any]:
        """An object as it is now."""
        with self.lock:
            return copy.deepcopy(self.objects[path_of(kind, namespace, name)])

    def drop(self, kind: str, name: str, namespace: str = "team-a") -> None:
        """Forget an object."""
        with self.lock:
            self.objects.pop(path_of(kind, namespace, name), None)

    def serve(self, snapshot: Snapshot) -> None:
        """Keep everything that a snapshot has, and refuse what it could not read."""
        for kind, objects in snapshot.objects.items():
            for at, obj in enumerate(objects):
                if kind == "Event":
                    obj = {**obj, "metadata": {"name": f"event-{at}"}}
                self.put("Deployment" if kind == "Controller" else kind, obj, snapshot.namespace)
        for what, error in snapshot.refused.items():
            if what in KINDS:
                (self.forbidden if error["status"] == 403 else self.missing).add(KINDS[what][0])
        for key, text in snapshot.logs.items():
            self.logs[key] = text
        for pod, answer in snapshot.answers.items():
            for key, path in (("health", "/v2/health/ready"), ("live", "/v2/health/live"), ("metrics", "/metrics")):
                if key in answer:
                    page = answer[key]
                    self.pages[f"{pod}{path}"] = (
                        (200, page) if isinstance(page, str) else (page["status"], json.dumps(page["body"]))
                    )

    @staticmethod
    def status(code: int, message: str) -> dict[str, Any]:
        """Kubernetes' answer for an error."""
        return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}

    def answer(self, method: str, target: str, body: Any) -> tuple[int, Any]:
        """The status and body for a request."""
        url = urlsplit(target)
        path, query = url.path, parse_qs(url.query)
        kind = next((k for k, (where, _) in KINDS.items() if _is_of(path, where)), None)
        if kind is None:
            return 404, "404 page not found"
        if KINDS[kind][0] in self.missing:
            return 404, "404 page not found"
        if KINDS[kind][0] in self.forbidden:
            return 403, self.status(403, f'{kind} is forbidden: User "test" cannot do this')
        if method == "GET":
            self.reads.append(path)
            return self._read(kind, path, query)
        if path.endswith("/eviction"):
            pod = path.split("/")[-2]
            code, message = self.evict_answer(pod)
            if code < 300:
                self.writes.append(("EVICT", pod, body))
                self.on_write("EVICT", pod, body)
            return code, self.status(code, message)
        if "/proxy/" in path:
            return self.post_to_pod(path.split("/pods/")[1], body)
        if self.refusal:
            return self.refusal[0], self.status(*self.refusal)
        dry = query.get("dryRun") == ["All"]
        return self._write(method, path, body, dry)

    def _read(self, kind: str, path: str, query: dict[str, list[str]]) -> tuple[int, Any]:
        if path.endswith("/log"):
            pod = path.split("/")[-2]
            key = f"{pod}/{query['container'][0]}" + ("/previous" if "previous" in query else "")
            return (
                (200, self.logs[key]) if key in self.logs else (400, self.status(400, "previous container not found"))
            )
        if "/proxy/" in path:
            pod, rest = path.split("/pods/")[1].split("/proxy", 1)
            return self.pages.get(pod.split(":")[0] + rest, (503, "no endpoints"))
        if path in self.objects:
            return 200, self.objects[path]
        plural = KINDS[kind][0].split("|")[1]
        if path.endswith(f"/{plural}"):
            everywhere = "/namespaces/" not in path
            found = [
                obj
                for where, obj in self.objects.items()
                if where.startswith(path + "/") or (everywhere and _is_of(where, KINDS[kind][0]))
            ]
            return 200, {"kind": f"{kind}List", "metadata": {}, "items": found}
        name = path.rsplit("/", 1)[1]
        return 404, self.status(404, f'{plural} "{name}" not found')

    def _write(self, method: str, path: str, body: Any, dry: bool) -> tuple[int, Any]:
        if method == "POST":
            path = f"{path}/{body['metadata'].get('name') or 'event-' + str(self._version)}"
            if path in self.objects:
                return 409, self.status(409, "already exists")
            new = body
        elif path not in self.objects:
            return 404, self.status(404, "not found")
        elif method == "DELETE":
            self.writes.append((method, path, body))
            return 200, self.objects.pop(path)
        elif method == "PATCH":
            new = merge(self.objects[path], body)
        else:
            asked = body["metadata"].get("resourceVersion")
            if asked and asked != self.objects[path]["metadata"]["resourceVersion"]:
                return 409, self.status(409, "the object has been modified")
            new = body
        if not dry:
            self._version += 1
            new = copy.deepcopy(new)
            new["metadata"]["resourceVersion"] = str(self._version)
            self.objects[path] = new
            self.writes.append((method, path, body))
            self.on_write(method, path, body)
        return 200, new


def _is_of(path: str, where: str) -> bool:
    group, plural = where.split("|")
    if not path.startswith(group + "/"):
        return False
    rest = path[len(group) + 1 :].split("/")
    if rest[0] == "namespaces" and len(rest) > 2:
        rest = rest[2:]
    return rest[0] == plural
