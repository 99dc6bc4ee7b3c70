"""Write the Grafana dashboards of the chart from one description.

Usage: build_dashboards.py [--check]

`--check` changes nothing and fails on drift. `BOARDS` is the description: per dashboard its panels in reading order,
per panel its queries. `$in` in a query stands for the selection of namespace and service.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "charts" / "kserve-vllm" / "files" / "dashboards"
_SELECTION = 'namespace=~"$namespace",inferenceservice=~"$inferenceservice"'
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS, _WIDTH, _HEIGHT = 2, 12, 8


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: what is shown.
        unit: Grafana's name of the unit.
        text: how to read it.
        queries: legend to PromQL.
        most: upper end of the axis, where there is one.
    """

    title: str
    unit: str
    text: str
    queries: Mapping[str, str]
    most: float | None = None


def _quantile(q: float, metric: str, by: str = "") -> str:
    return f"histogram_quantile({q}, sum by ({by}le) (rate({metric}_bucket{{$in}}[$__rate_interval])))"


def _rate(metric: str, by: str, more: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{$in{more}}}[$__rate_interval]))"


def _quantiles(metric: str) -> dict[str, str]:
    return {"median": _quantile(0.5, metric), "p90": _quantile(0.9, metric), "p99": _quantile(0.99, metric)}


BOARDS: Mapping[str, tuple[str, Sequence[Panel]]] = {
    "service": (
        "kserve-vllm: service",
        (
            Panel(
                "Requests by outcome",
                "reqps",
                "What became of requests, by kind of end.",
                {"{{outcome}}": _rate("kserve_vllm_requests_total", "outcome")},
            ),
            Panel(
                "Requests by protocol",
                "reqps",
                "Which interface is used.",
                {"{{protocol}}": _rate("kserve_vllm_requests_total", "protocol")},
            ),
            Panel(
                "Failing requests, share of the accepted",
                "percentunit",
                "The objective is 0.1 %, where the rules' values say nothing else. Refused and cancelled requests do "
                "not count.",
                {
                    "last hour": "inferenceservice:kserve_vllm_requests:error_ratio_rate1h{$in}",
                    "last 5 minutes": "inferenceservice:kserve_vllm_requests:error_ratio_rate5m{$in}",
                },
            ),
            Panel(
                "Turned away, by reason",
                "reqps",
                "Requests that never reached the engine.",
                {"{{reason}}": _rate("kserve_vllm_rejections_total", "reason")},
            ),
            Panel(
                "Time to first token",
                "s",
                "From a request's arrival to its first token.",
                _quantiles("kserve_vllm_time_to_first_token_seconds"),
            ),
            Panel(
                "First tokens out of time",
                "percentunit",
                "Later than after 500 ms, of which 1 % may be, where the rules' values say nothing else.",
                {
                    "last hour": "inferenceservice:kserve_vllm_first_tokens:slow_ratio_rate1h{$in}",
                    "last 5 minutes": "inferenceservice:kserve_vllm_first_tokens:slow_ratio_rate5m{$in}",
                },
            ),
            Panel(
                "Inter-token latency",
                "s",
                "Mean of each request.",
                _quantiles("kserve_vllm_inter_token_latency_seconds"),
            ),
            Panel(
                "Whole request",
                "s",
                "From arrival to the end of the answer.",
                _quantiles("kserve_vllm_request_duration_seconds"),
            ),
            Panel(
                "Tokens per second",
                "short",
                "Prompt tokens, those of them that were cached, and generated tokens.",
                {
                    "prompt": f"sum({_rate('kserve_vllm_prompt_tokens_total', 'model')})",
                    "cached": f"sum({_rate('kserve_vllm_cached_prompt_tokens_total', 'model')})",
                    "output": f"sum({_rate('kserve_vllm_output_tokens_total', 'model')})",
                },
            ),
            Panel(
                "Output tokens per second by model",
                "short",
                "Base model and adapters.",
                {"{{model}}": _rate("kserve_vllm_output_tokens_total", "model")},
            ),
            Panel(
                "Pods by state",
                "short",
                "Where each process is in its life.",
                {"{{state}}": "sum by (state) (kserve_vllm_lifecycle_state{$in})"},
            ),
            Panel(
                "Drain progress, slowest pod",
                "percentunit",
                "Of pods that drain: the share of their requests that have ended.",
                {
                    "done": "min(kserve_vllm_drain_progress_ratio{$in} and on (pod) "
                    'kserve_vllm_lifecycle_state{$in,state="draining"} == 1) or vector(1)'
                },
                1,
            ),
        ),
    ),
    "engine": (
        "kserve-vllm: engine",
        (
            Panel(
                "Running and waiting requests",
                "short",
                "Waiting ones that stay: less is taken in than arrives.",
                {"running": "sum(vllm:num_requests_running{$in})", "waiting": "sum(vllm:num_requests_waiting{$in})"},
            ),
            Panel(
                "Time in the queue",
                "s",
                "Before a request is first scheduled.",
                _quantiles("kserve_vllm_queue_time_seconds"),
            ),
            Panel(
                "KV cache in use",
                "percentunit",
                "Per pod; near 1, requests wait or are preempted.",
                {"{{pod}}": "max by (pod) (vllm:kv_cache_usage_perc{$in})"},
                1,
            ),
            Panel(
                "Prefix cache hits",
                "percentunit",
                "Share of prompt tokens that were found in the cache.",
                {
                    "hits": f"sum({_rate('vllm:prefix_cache_hits_total', 'pod')}) / "
                    f"(sum({_rate('vllm:prefix_cache_queries_total', 'pod')}) > 0)"
                },
                1,
            ),
            Panel(
                "Batch: tokens per step",
                "short",
                "How full the engine's steps are.",
                {
                    "mean": f"sum({_rate('vllm:iteration_tokens_total_sum', 'pod')}) / "
                    f"(sum({_rate('vllm:iteration_tokens_total_count', 'pod')}) > 0)"
                },
            ),
            Panel(
                "Preemptions per second",
                "short",
                "Work that was thrown away for want of KV cache.",
                {"{{pod}}": _rate("vllm:num_preemptions_total", "pod")},
            ),
            Panel(
                "Where a request's time goes",
                "s",
                "Mean per request and phase.",
                {
                    phase: f"sum({_rate(f'vllm:request_{phase}_time_seconds_sum', 'pod')}) / "
                    f"(sum({_rate(f'vllm:request_{phase}_time_seconds_count', 'pod')}) > 0)"
                    for phase in ("queue", "prefill", "decode")
                },
            ),
            Panel(
                "Time between tokens",
                "s",
                "Each gap counted by itself.",
                _quantiles("vllm:inter_token_latency_seconds"),
            ),
            Panel(
                "Length of prompts and answers",
                "short",
                "Tokens, p90.",
                {
                    "prompt": _quantile(0.9, "vllm:request_prompt_tokens"),
                    "answer": _quantile(0.9, "vllm:request_generation_tokens"),
                },
            ),
            Panel(
                "Finished requests by reason",
                "reqps",
                "stop, length, abort, error.",
                {"{{finished_reason}}": _rate("vllm:request_success_total", "finished_reason")},
            ),
            Panel(
                "Adapters",
                "short",
                "LoRA adapters by state.",
                {"{{state}}": "sum by (state) (kserve_vllm_adapters{$in})"},
            ),
            Panel(
                "GPU utilization and free memory",
                "percentunit",
                "From NVIDIA's DCGM exporter, where it runs.",
                {
                    "busy {{pod}}": 'pod:dcgm_gpu_utilization:ratio{namespace=~"$namespace"}',
                    "memory free {{pod}}": 'pod:dcgm_gpu_memory_free:ratio{namespace=~"$namespace"}',
                },
                1,
            ),
        ),
    ),
    "tenants": (
        "kserve-vllm: tenants",
        (
            Panel(
                "Requests by tenant",
                "reqps",
                "`none` until tenants are configured.",
                {"{{tenant}}": _rate("kserve_vllm_requests_total", "tenant")},
            ),
            Panel(
                "Refused and failed requests by tenant",
                "reqps",
                "Without those that the client gave up.",
                {
                    "{{tenant}} {{outcome}}": _rate(
                        "kserve_vllm_requests_total", "tenant, outcome", ',outcome!~"ok|cancelled"'
                    )
                },
            ),
            Panel(
                "Output tokens per second by tenant",
                "short",
                "What the device worked for.",
                {"{{tenant}}": _rate("kserve_vllm_output_tokens_total", "tenant")},
            ),
            Panel(
                "Prompt tokens per second by tenant",
                "short",
                "Cached ones included.",
                {"{{tenant}}": _rate("kserve_vllm_prompt_tokens_total", "tenant")},
            ),
            Panel(
                "Time to first token by tenant",
                "s",
                "p99.",
                {"{{tenant}}": _quantile(0.99, "kserve_vllm_time_to_first_token_seconds", "tenant, ")},
            ),
            Panel(
                "Requests by tenant and model",
                "reqps",
                "Base model and adapters.",
                {"{{tenant}} {{model}}": _rate("kserve_vllm_requests_total", "tenant, model")},
            ),
        ),
    ),
    "engines": (
        "kserve-vllm: other engines",
        (
            Panel(
                "Waiting requests",
                "short",
                "SGLang, TGI, llama.cpp, LMDeploy, Triton: each by its own metric.",
                {"{{inferenceservice}}": "inferenceservice:engine_requests_waiting:sum{$in}"},
            ),
            Panel(
                "Pods",
                "short",
                "Pods that Prometheus reads.",
                {"{{inferenceservice}}": "inferenceservice:engine_pods:count{$in}"},
            ),
            Panel(
                "KV cache in use",
                "percentunit",
                "The fullest pod, of SGLang and LMDeploy.",
                {"{{inferenceservice}}": "inferenceservice:engine_cache_usage:max{$in}"},
                1,
            ),
            Panel(
                "Time to first token",
                "s",
                "SGLang and LMDeploy, p99.",
                {
                    "SGLang": _quantile(0.99, "sglang:time_to_first_token_seconds"),
                    "LMDeploy": _quantile(0.99, "lmdeploy:time_to_first_token_seconds"),
                },
            ),
            Panel(
                "Output tokens per second",
                "short",
                "What the engines generate.",
                {
                    "SGLang": f"sum({_rate('sglang:generation_tokens_total', 'pod')})",
                    "LMDeploy": f"sum({_rate('lmdeploy:generation_tokens_total', 'pod')})",
                    "llama.cpp": f"sum({_rate('llamacpp:tokens_predicted_total', 'pod')})",
                    "TGI": f"sum({_rate('tgi_request_generated_tokens_sum', 'pod')})",
                },
            ),
            Panel(
                "Requests per second",
                "reqps",
                "TGI's and Triton's counts.",
                {
                    "TGI": f"sum({_rate('tgi_request_count', 'pod')})",
                    "Triton": f"sum({_rate('nv_inference_request_success', 'pod')})",
                },
            ),
        ),
    ),
    "scaling": (
        "kserve-vllm: autoscaling and canary",
        (
            Panel(
                "Ready pods",
                "short",
                "Pods that take requests, and pods that Prometheus reads.",
                {"ready": 'sum(kserve_vllm_lifecycle_state{$in,state="ready"})', "up": "sum(up{$in})"},
            ),
            Panel(
                "Load per pod",
                "short",
                "What KEDA's and the HPA's targets are compared with.",
                {
                    "waiting": "sum(vllm:num_requests_waiting{$in}) / sum(up{$in})",
                    "running": "sum(vllm:num_requests_running{$in}) / sum(up{$in})",
                },
            ),
            Panel(
                "Requests in flight by pod",
                "short",
                "At the edge; what Knative's concurrency counts.",
                {"{{pod}}": "sum by (pod) (kserve_vllm_requests_in_flight{$in})"},
            ),
            Panel(
                "Seconds from start to ready",
                "s",
                "How long pods that are not ready yet have been in their state.",
                {
                    "{{pod}}": "max by (pod) (kserve_vllm_lifecycle_state_seconds{$in} unless on (pod) "
                    'kserve_vllm_lifecycle_state{$in,state="ready"} == 1) or vector(0)'
                },
            ),
            Panel(
                "Where a start's time goes",
                "s",
                "Mean over pods; first_probe comes after ready.",
                {"{{phase}}": "avg by (phase) (kserve_vllm_start_phase_seconds{$in})"},
            ),
            Panel(
                "Requests by revision",
                "reqps",
                "The split of traffic between stable and canary.",
                {"{{revision}}": _rate("kserve_vllm_requests_total", "revision")},
            ),
            Panel(
                "Failing requests by revision",
                "percentunit",
                "Share of the accepted.",
                {"{{revision}}": "revision:kserve_vllm_requests:error_ratio_rate10m{$in}"},
            ),
            Panel(
                "Time to first token by revision",
                "s",
                "p90 over ten minutes.",
                {"{{revision}}": "revision:kserve_vllm_time_to_first_token_seconds:p90_10m{$in}"},
            ),
            Panel(
                "Inter-token latency by revision",
                "s",
                "p90.",
                {"{{revision}}": _quantile(0.9, "kserve_vllm_inter_token_latency_seconds", "revision, ")},
            ),
            Panel(
                "Output tokens per second by revision",
                "short",
                "Work done by each.",
                {"{{revision}}": _rate("kserve_vllm_output_tokens_total", "revision")},
            ),
            Panel(
                "Versions by revision",
                "short",
                "Pods by version of the runtime and of vLLM.",
                {
                    "{{revision}}: {{version}}, vLLM {{vllm_version}}": (
                        "count by (revision, version, vllm_version) (kserve_vllm_build_info{$in})"
                    )
                },
            ),
        ),
    ),
}


def dashboard(name: str) -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    title, panels = BOARDS[name]
    # Of which the choices of namespace and service are read: other engines have no state of a lifecycle.
    series = "inferenceservice:engine_pods:count" if name == "engines" else "kserve_vllm_lifecycle_state"
    return {
        "uid": f"kserve-vllm-{name}",
        "title": title,
        "tags": ["kserve-vllm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                _variable("namespace", f"label_values({series}, namespace)"),
                _variable("inferenceservice", f'label_values({series}{{namespace=~"$namespace"}}, inferenceservice)'),
            ]
        },
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, _COLUMNS)
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": column * _WIDTH, "y": row * _HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": _SOURCE,
                "expr": query.replace("$in", _SELECTION),
                "legendFormat": legend,
                "exemplar": "_bucket{" in query,
            }
            for place, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def main() -> int:
    """Write the files, or compare them."""
    wanted = {f"{name}.json": json.dumps(dashboard(name), indent=1) + "\n" for name in BOARDS}
    if "--check" in sys.argv:
        there = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
        if there != wanted:
            print("the dashboards have drifted; run: .venv/bin/python runtime/tools/build_dashboards.py")
        return int(there != wanted)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob("*.json"):
        path.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
