"""`kserve-vllm top`: one server at a URL, or all pods of an InferenceService."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.bench.command import read_key
from kserve_vllm.ops.cluster import ApiError, Cluster, Json
from kserve_vllm.ops.diagnose.facts import SERVING, dig
from kserve_vllm.ops.exposition import fetch
from kserve_vllm.ops.operations import CommandFailed, add_cluster_arguments, split_url
from kserve_vllm.ops.tables import bar, seconds, spark, table
from kserve_vllm.ops.top.screen import Screen, is_live
from kserve_vllm.ops.top.view import ServerReading, View, read, view

_EPILOG = """
Examples:
  kserve-vllm top http://localhost:8080            one server, or what a port-forward leads to
  kserve-vllm top chat -n team-a                   all pods of the InferenceService chat
  kserve-vllm top chat -n team-a --once --json | jq .total.output_per_s
With an admin port, metrics are there: kserve-vllm top http://localhost:8080 --metrics-url http://localhost:9090, or
--port for pods. It reads /v2/health/ready and /metrics alone; in a cluster through the API server, which takes the
right `get` on pods/proxy, and `get` on the InferenceService. Rates are of the time between two readings. q or Ctrl-C
ends it.

Exit codes: 0 it was read, 2 an argument can't be used, 3 nothing could be read; with --once also 1: something is not
ready.
"""
_NOT_READ = 3
_SHORT = 24
_HISTORY = 600
_AT_ONCE = 16
Get = Callable[[str], tuple[int, str]]


def main(arguments: Sequence[str]) -> int:
    """Run `kserve-vllm top ...`; returns the exit code.

    Raises:
        ConfigError: an argument can't be used.
        CommandFailed: nothing can be read.
    """
    parser = argparse.ArgumentParser(
        prog="kserve-vllm top",
        usage="kserve-vllm top (URL | NAME) [options]",
        description="Watch a server, or all pods of a service.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="URL|NAME", help="http(s)://HOST:PORT, or the name of an InferenceService")
    parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between readings (default: 2)")
    parser.add_argument("--once", action="store_true", help="two readings, print, end")
    parser.add_argument("--json", action="store_true", help="print JSON; without --once a line for each interval")
    parser.add_argument("--metrics-url", metavar="URL", help="where metrics are, if on an admin port")
    parser.add_argument("--port", type=int, default=8080, help="of the pods' metrics and health (default: 8080)")
    parser.add_argument("--api-key-env", metavar="VARIABLE", help="variable that holds a key, where one is asked for")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="file that holds it")
    add_cluster_arguments(parser)
    args = parser.parse_args(list(arguments))
    if not 0.2 <= args.interval <= 3600:
        raise ConfigError("--interval: between 0.2 and 3600 seconds")
    source: _Source = _Server(args) if "://" in args.target else _Service(args)
    try:
        return _once(source, args) if args.once else _watch(source, args)
    except ApiError as error:
        raise CommandFailed(str(error), _NOT_READ) from None


class _Source:
    """Where readings come from."""

    name: str

    def readings(self) -> dict[str, ServerReading]:
        """By server, what it says now."""
        raise NotImplementedError

    shares: Mapping[str, float] = {}
    """Percent of the traffic by revision, or by canary, as the cluster has it."""


class _Server(_Source):
    """One server at its URL."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.name = args.target.rstrip("/").removesuffix("/v1")
        metrics = (args.metrics_url or self.name).rstrip("/")
        for url in (self.name, metrics):
            split_url(url)
        key = read_key(args.api_key_env, args.api_key_file)

        def get(path: str) -> tuple[int, str]:
            return fetch((metrics if path == "/metrics" else self.name) + path, key)

        self._get = get

    def readings(self) -> dict[str, ServerReading]:
        """Of the one."""
        return {self.name: read(self._get)}


class _Service(_Source):
    """The pods of an InferenceService, through the API server."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.metrics_url:
            raise ConfigError("--metrics-url is for a URL; for the pods of a service: --port")
        self._cluster = Cluster(args.context, args.kubeconfig)
        self._namespace = args.namespace or self._cluster.default_namespace
        self._service, self._port = args.target, args.port
        self.name = f"{self._namespace}/{args.target}"

    def readings(self) -> dict[str, ServerReading]:
        """Of each pod that serves; raises Unreadable where the service or its pods can't be read."""
        isvc = self._cluster.get("InferenceService", self._namespace, self._service)
        self.shares = shares(isvc)
        label = f"serving.kserve.io/inferenceservice={self._service}"
        pods = [
            pod
            for pod in self._cluster.list("Pod", self._namespace, labelSelector=label)
            if not pod["metadata"].get("deletionTimestamp")
            and dig(pod, "status", "phase") not in ("Succeeded", "Failed")
        ]
        with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(pods)))) as pool:
            found = list(pool.map(self._read, pods))
        return {pod["metadata"]["name"]: reading for pod, reading in zip(pods, found, strict=True)}

    def _read(self, pod: Json) -> ServerReading:
        name, group = pod["metadata"]["name"], group_of(pod)
        starting = not_running(pod)
        if starting:
            return ServerReading(time.monotonic(), {"state": starting, "ready": False}, group=group)

        def get(path: str) -> tuple[int, str]:
            try:
                status, text = self._cluster.through_pod(self._namespace, name, self._port, path)
            except ApiError as error:
                return 0, error.message
            if '"kind":"Status"' in text.replace(" ", "") and status >= 400:
                return 0, f"{status}: {json.loads(text).get('message', '')}" if text.startswith("{") else text[:200]
            return status, text

        return read(get, group)


def shares(isvc: Json) -> dict[str, float]:
    """Percent of the traffic: by revision in Knative mode, `stable` and the canaries' names in Standard mode."""
    found = {
        str(each.get("revisionName")): float(each.get("percent") or 0)
        for each in dig(isvc, "status", "components", "predictor", "traffic") or []
        if each.get("percent")
    }
    canaries = {
        str(dig(each, "predictor", "name") or "canary"): float(each.get("trafficPercent") or 0)
        for each in dig(isvc, "spec", "canary") or []
    }
    return {"stable": 100 - sum(canaries.values()), **canaries} if canaries else found


def group_of(pod: Json) -> str:
    """The revision (Knative) or the Deployment (Standard) of a pod."""
    labels = pod["metadata"].get("labels") or {}
    if revision := labels.get("serving.knative.dev/revision"):
        return str(revision)
    name = str(pod["metadata"]["name"])
    suffix = str(labels.get("pod-template-hash") or "")
    return name.partition(f"-{suffix}")[0] if suffix else name


def not_running(pod: Json) -> str:
    """The phase of a start before the server can answer; "" where it runs."""
    statuses = [*(dig(pod, "status", "initContainerStatuses") or []), *(dig(pod, "status", "containerStatuses") or [])]
    for status in statuses:
        state = status.get("state") or {}
        if status["name"] in SERVING and "running" in state:
            return ""
        if "waiting" in state:
            return f"{status['name']}: {dig(state, 'waiting', 'reason') or 'waiting'}"
        if "running" in state and status["name"] not in SERVING and not status.get("ready"):
            return f"{status['name']} runs (the model is fetched)"
        if "terminated" in state and dig(state, "terminated", "reason") != "Completed":
            return f"{status['name']}: {dig(state, 'terminated', 'reason')}"
    return "" if statuses else str(dig(pod, "status", "phase") or "Pending").lower()


def _once(source: _Source, args: argparse.Namespace) -> int:
    before = source.readings()
    time.sleep(args.interval)
    after = source.readings()
    content = figures(source, before, after)
    print(json.dumps(machine(content), indent=1) if args.json else text(content, [], 200))
    if after and not any(reading.health for reading in after.values()):
        return _NOT_READ
    return int(not after or content["total"].pods[0] != content["total"].pods[1])


def _watch(source: _Source, args: argparse.Namespace) -> int:
    """Until it is told to end."""
    before, history = source.readings(), list[View]()
    if not any(reading.health for reading in before.values()) and not isinstance(source, _Service):
        raise CommandFailed(f"{source.name}: {next(iter(before.values())).error}", _NOT_READ)
    try:
        with Screen(is_live() and not args.json) as screen:
            while not screen.pressed(args.interval):
                try:
                    after = source.readings()
                except ApiError as error:
                    after = {"-": ServerReading(time.monotonic(), error=str(error))}
                content = figures(source, before, after)
                before, history = after, [*history, content["total"]][-_HISTORY:]
                if args.json:
                    print(json.dumps(machine(content)), flush=True)
                else:
                    screen.show(text(content, history, shutil.get_terminal_size((120, 40)).columns))
    except KeyboardInterrupt:
        pass
    return 0


def figures(source: _Source, before: Mapping[str, ServerReading], after: Mapping[str, ServerReading]) -> dict[str, Any]:
    """The views of all, of each group and of each server: what `machine` and `text` are made of."""
    pairs = {name: (before.get(name, ServerReading(0.0)), reading) for name, reading in after.items()}
    groups: dict[str, list[tuple[ServerReading, ServerReading]]] = {}
    for pair in pairs.values():
        groups.setdefault(pair[1].group, []).append(pair)
    return {
        "name": source.name,
        "shares": dict(source.shares),
        "total": view(list(pairs.values())),
        "groups": {name: view(own) for name, own in groups.items()} if len(groups) > 1 else {},
        "servers": {name: view([pair]) for name, pair in pairs.items()},
    }


def machine(content: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON: every value of `View`, for all together, by group, by server; and the traffic's shares."""
    return {
        "name": content["name"],
        "traffic_percent": content["shares"],
        "total": content["total"].machine(),
        "groups": {name: own.machine() for name, own in content["groups"].items()},
        "servers": {name: own.machine() for name, own in content["servers"].items()},
    }


def text(content: Mapping[str, Any], history: Sequence[View], width: int) -> str:
    """A page for people."""
    total: View = content["total"]
    pods, ready = total.pods
    many = f", {ready} of {pods} pods ready" if pods != 1 else ""
    lines = [f"{content['name']}: {total.state} for {_time(total.state_s)}{many}"]
    if total.error:
        lines.append(f"  not read: {total.error}")
    if content["shares"]:
        lines.append("traffic   " + ", ".join(f"{name} {share:.0f} %" for name, share in content["shares"].items()))
    queued = ", ".join(f"{value:.0f} {name}" for name, value in total.queued.items())
    firsts, gaps = (
        "  ".join(f"{label} {seconds(value)}" for label, value in found.items()) or "-"
        for found in (total.first_token_s, total.gap_s)
    )
    lines += [
        f"requests  {_n(total.requests_per_s, 2)}/s, refused {_n(total.refused_per_s, 2)}/s, in flight "
        f"{_n(total.in_flight)}",
        f"engine    {_n(total.running)} running, {_n(total.waiting)} waiting; queued in front: {queued or '0'}",
        f"tokens    {_n(total.output_per_s)}/s out, {_n(total.prompt_per_s)}/s in",
        f"latency   first token {firsts}; gap {gaps}",
        f"KV cache  {_share(total.kv_used)} {bar(total.kv_used or 0, 1.0, 30)}",
        f"prefix    {_share(total.prefix_hits)} of prompt tokens from the cache",
    ]
    if total.adapter_states:
        lines.append("adapters  " + ", ".join(f"{value:.0f} {name}" for name, value in total.adapter_states.items()))
    if len(history) > 1:
        room = max(20, min(100, width - 24))
        lines += [
            "",
            "tokens/s  " + spark([own.output_per_s or 0.0 for own in history][-room:], room),
            "running   " + spark([own.running or 0.0 for own in history][-room:], room),
            "KV cache  " + spark([own.kv_used or 0.0 for own in history][-room:], room, 1.0),
        ]
    for title, found in (("TENANT", total.tenants), ("ADAPTER", total.adapters)):
        if found:
            rows = [(title, "TOKENS/S", "SHARE")]
            whole = sum(found.values())
            rows += [(name, _n(value), f"{value / whole:.0%}") for name, value in list(found.items())[:8]]
            lines += ["", table(rows, right=(1, 2))]
    for title, views in (("REVISION", content["groups"]), ("POD", content["servers"] if pods != 1 else {})):
        if views:
            lines += ["", _table(title, views)]
    return "\n".join(lines)


def _table(title: str, views: Mapping[str, View]) -> str:
    rows: list[tuple[str, ...]] = [
        (title, "STATE", "RUNNING", "WAITING", "REQ/S", "TOKENS/S", "FIRST TOKEN P95", "GAP P95", "KV", "PREFIX")
    ]
    for name, own in views.items():
        rows.append(
            (
                name,
                own.state[:_SHORT],
                _n(own.running),
                _n(own.waiting),
                _n(own.requests_per_s, 2),
                _n(own.output_per_s),
                *(seconds(found["p95"]) if found else "-" for found in (own.first_token_s, own.gap_s)),
                _share(own.kv_used),
                _share(own.prefix_hits),
            )
        )
    return table(rows, right=range(2, 10))


def _n(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _time(value: float) -> str:
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
