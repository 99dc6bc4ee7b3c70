"""What a version did between two moments, from Prometheus.

Counters are subtracted pod by pod, not with `increase()`: a series that appears with its first event has no increase
by Prometheus's rules, and a canary's first errors are just what matters.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from kserve_vllm.ops.cluster import Json

FIRST_TOKEN = "kserve_vllm_time_to_first_token_seconds"  # noqa: S105
GAP = "kserve_vllm_inter_token_latency_seconds"


class PrometheusError(Exception):
    """Prometheus did not answer, or not with what was asked for."""


@dataclass
class Sample:
    """What a version did.

    Attributes:
        outcomes: requests by outcome (as in `kserve_vllm_requests_total`).
        histograms: by metric, the count of each bucket alone.
        bounds: by metric, the upper bounds in seconds of all buckets but the last.
        sums: by metric, the sum of the values in seconds.
        restarts: how many of its pods started anew meanwhile.
        pods: how many pods it has.
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    histograms: dict[str, list[float]] = field(default_factory=dict)
    bounds: dict[str, list[float]] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    restarts: int = 0
    pods: int = 0

    @property
    def requests(self) -> int:
        """All but those that clients gave up or got wrong themselves."""
        return sum(self.outcomes.get(name, 0) for name in ("ok", "server_error", "unavailable", "refused"))

    @property
    def errors(self) -> int:
        """Requests that the server failed."""
        return self.outcomes.get("server_error", 0) + self.outcomes.get("unavailable", 0)

    @property
    def refusals(self) -> int:
        """Requests that it turned away."""
        return self.outcomes.get("refused", 0)

    def to_json(self) -> Json:
        """For the rollout's state."""
        return {
            "outcomes": self.outcomes,
            "histograms": self.histograms,
            "bounds": self.bounds,
            "sums": self.sums,
            "restarts": self.restarts,
            "pods": self.pods,
        }


class Prometheus:
    """One Prometheus.

    Args:
        url: its base.
        token: a bearer token, where it wants one.
        timeout_s: for one query.
    """

    def __init__(self, url: str, token: str = "", timeout_s: float = 20.0) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(headers=headers, timeout=timeout_s)
        weakref.finalize(self, self._http.close)

    def query(self, expression: str, at: float) -> list[tuple[Mapping[str, str], float]]:
        """The series of an instant query at a moment (seconds of the wall clock).

        Raises:
            PrometheusError: it did not answer with a vector.
        """
        try:
            answer = self._http.post(self.url + "/api/v1/query", data={"query": expression, "time": f"{at:.3f}"})
            body: Any = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL, json.JSONDecodeError) as error:
            raise PrometheusError(f"{self.url} does not answer: {error}") from error
        if not isinstance(body, dict) or body.get("status") != "success":
            said = body.get("error") if isinstance(body, dict) else body
            raise PrometheusError(f"{self.url} answers {answer.status_code}: {said}")
        rows = [(row["metric"], float(row["value"][1])) for row in body["data"]["result"]]
        return [(labels, value) for labels, value in rows if not math.isnan(value)]

    def sample(self, namespace: str, service: str, revision: str, since: float, until: float) -> Sample:
        """What the pods of a version did between two moments.

        The labels are those that the chart's PodMonitor gives: `namespace`, `inferenceservice`, `revision`, `pod`.

        Raises:
            PrometheusError: as `query`.
        """
        where = (
            "{"
            + ",".join(
                f"{key}={json.dumps(value)}"
                for key, value in (("namespace", namespace), ("inferenceservice", service), ("revision", revision))
            )
            + "}"
        )
        started = f"max by (pod) (process_start_time_seconds{where})"
        before = {labels.get("pod", ""): value for labels, value in self.query(started, since)}
        now = {labels.get("pod", ""): value for labels, value in self.query(started, until)}
        anew = {pod for pod, value in now.items() if pod in before and value > before[pod]}
        out = Sample(restarts=len(anew), pods=len(now))
        rise = self._rise(f"sum by (pod, outcome) (kserve_vllm_requests_total{where})", since, until, anew)
        for (_, outcome), value in rise.items():
            out.outcomes[outcome] = out.outcomes.get(outcome, 0) + round(value)
        for metric in (FIRST_TOKEN, GAP):
            rise = self._rise(f"sum by (pod, le) ({metric}_bucket{where})", since, until, anew)
            cumulative: dict[float, float] = {}
            for (_, le), value in rise.items():
                cumulative[float(le)] = cumulative.get(float(le), 0.0) + value
            edges = sorted(cumulative)
            counts = [
                cumulative[middleware] - (cumulative[edges[at - 1]] if at else 0.0)
                for at, middleware in enumerate(edges)
            ]
            if sum(counts) > 0:
                out.bounds[metric] = [middleware for middleware in edges if not math.isinf(middleware)]
                out.histograms[metric] = [max(0.0, count) for count in counts]
                rise = self._rise(f"sum by (pod) ({metric}_sum{where})", since, until, anew)
                out.sums[metric] = sum(rise.values())
        return out

    def _rise(self, expression: str, since: float, until: float, anew: set[str]) -> dict[tuple[str, str], float]:
        """By pod and second label, how much a counter rose. What was not there before began at 0."""

        def by_key(at: float) -> dict[tuple[str, str], float]:
            out = {}
            for labels, value in self.query(expression, at):
                other = next((v for k, v in labels.items() if k != "pod"), "")
                out[labels.get("pod", ""), other] = value
            return out

        before, now = by_key(since), by_key(until)
        return {
            key: value - (0.0 if key[0] in anew or before.get(key, 0.0) > value else before.get(key, 0.0))
            for key, value in now.items()
        }
