"""Several teams: two releases side by side, a tenant on the runtimes of another, keys, limits and adapters."""

from __future__ import annotations

import hashlib
import json
import secrets
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from kubernetes import client

from tests.e2e.cluster import Cluster, wait
from tests.e2e.conftest import Record, Suite
from tests.e2e.releases import CATALOGUE, HelmFailed, Release, merged, small
from tests.e2e.traffic import Load, Target, ask

pytestmark = pytest.mark.needs("gateway")
NAME = "shared"
_QUESTION = {"model": NAME, "prompt": "17 + 25 =", "max_tokens": 16, "temperature": 0}
_PER_MINUTE = 5


@dataclass
class Shared:
    """A release with keys: those of an administrator, of a tenant, and of one that may ask little."""

    release: Release
    admin: Target
    tenant: Target
    limited: Target
    nobody: Target


def _make_keys(suite: Suite, namespace: str, tenants: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A Secret `keys` with a key file in which each tenant has one key; the keys. `admin` is an administrator."""
    keys = {who: secrets.token_urlsafe(24) for who in tenants}
    file = {
        "tenants": {who: dict(what) for who, what in tenants.items() if what},
        "keys": [
            {
                "id": who,
                "tenant": who,
                "sha256": hashlib.sha256(key.encode()).hexdigest(),
                **({"admin": True} if who == "admin" else {}),
            }
            for who, key in keys.items()
        ],
    }
    secret = client.V1Secret(metadata=client.V1ObjectMeta(name="keys"), string_data={"keys.yaml": yaml.safe_dump(file)})
    suite.cluster.core.create_namespaced_secret(namespace, secret)
    return keys


@pytest.fixture(scope="module")
def shared(suite: Suite) -> Iterator[Shared]:
    """A service with a key file, on cluster-wide runtimes."""
    namespace = suite.namespace("team")
    keys = _make_keys(
        suite,
        namespace,
        {
            "admin": {},
            "tenant": {"models": [NAME, "upper"]},
            "limited": {"limits": {"requests_per_minute": _PER_MINUTE}},
        },
    )
    values = {
        "cluster": {"deploymentMode": "Standard", "gatewayAPI": True},
        "inferenceServices": {NAME: small(apiKeys={"secretName": "keys"})},
    }
    release = suite.release("team", namespace, values)
    release.install()
    suite.cluster.wait_ready(namespace, NAME)
    target = {who: suite.target(namespace, NAME, {"Authorization": f"Bearer {key}"}) for who, key in keys.items()}
    yield Shared(release, target["admin"], target["tenant"], target["limited"], suite.target(namespace, NAME))
    if not suite.keep:
        release.uninstall()


def test_keys_through_the_gateway(shared: Shared, record: Record) -> None:
    outcomes = {
        "no key": ask(shared.nobody, "/openai/v1/completions", _QUESTION).status_code,
        "a tenant's key": ask(shared.tenant, "/openai/v1/completions", _QUESTION).status_code,
        "the same, another model": ask(
            shared.tenant, "/openai/v1/completions", {**_QUESTION, "model": "french"}
        ).status_code,
        "probes, no key": ask(shared.nobody, "/v2/health/ready").status_code,
    }
    record("answers", outcomes)
    assert outcomes == {"no key": 401, "a tenant's key": 200, "the same, another model": 403, "probes, no key": 200}
    listed = {model["id"] for model in ask(shared.tenant, "/openai/v1/models").json()["data"]}
    assert "upper" in listed
    assert "french" not in listed
    assert "french" in {model["id"] for model in ask(shared.admin, "/openai/v1/models").json()["data"]}


def test_limits_through_the_gateway(shared: Shared, record: Record) -> None:
    count = Load(shared.limited, workers=3, count=12, stream=False, tokens=4, expected=(429,)).run(55)
    record(f"of 12 at {_PER_MINUTE} a minute", f"{count.whole} answered, {count.refused} refused with 429")
    assert not count.lost, count.lost
    assert count.whole == _PER_MINUTE
    refused = ask(shared.limited, "/openai/v1/completions", _QUESTION)
    assert refused.status_code == 429
    assert refused.headers["x-refusal-reason"] == "requests_per_minute"
    assert int(refused.headers["retry-after"]) > 0
    assert ask(shared.tenant, "/openai/v1/completions", _QUESTION).status_code == 200


def test_adapters_through_the_gateway(shared: Shared, record: Record) -> None:
    chat = {"messages": [{"role": "user", "content": "What is KServe?"}], "max_tokens": 24, "temperature": 0}
    plain, upper = (
        ask(shared.tenant, "/openai/v1/chat/completions", {**chat, "model": model}).json()["choices"][0]["message"][
            "content"
        ]
        for model in (NAME, "upper")
    )
    record("the model and its adapter", f"{plain[:40]!r}, {upper[:40]!r}")
    assert upper == upper.upper()
    assert plain != plain.upper()
    infer = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["17 + 25 ="]}]}
    assert ask(shared.tenant, "/v2/models/upper/infer", infer).status_code == 200


def test_a_second_release_with_the_same_runtimes_is_refused_and_harms_nothing(
    suite: Suite, shared: Shared, record: Record
) -> None:
    second = suite.release("same", suite.namespace("same"), {"runtimes": shared.release.values["runtimes"]})
    with pytest.raises(HelmFailed) as refused:
        second.install()
    said = str(refused.value)
    record("helm says", " ".join(said.split())[-300:])
    assert shared.release.values["runtimes"]["cpu"]["name"] in said
    second.uninstall()
    assert ask(shared.tenant, "/openai/v1/completions", _QUESTION).status_code == 200


def test_two_releases_side_by_side(suite: Suite, cluster: Cluster, shared: Shared, record: Record) -> None:
    """The second with runtimes of its namespace, of the same names, and a service of the same name."""
    namespace = suite.namespace("two")
    values = {
        "cluster": {"deploymentMode": "Standard", "gatewayAPI": True},
        "runtimes": merged(shared.release.values["runtimes"], {"scope": "Namespaced"}),
        "inferenceServices": {NAME: small()},
    }
    second = suite.release("two", namespace, values)
    second.install()
    record("seconds to Ready beside the first", cluster.wait_ready(namespace, NAME))
    assert ask(suite.target(namespace, NAME), "/openai/v1/completions", _QUESTION).status_code == 200
    assert ask(shared.nobody, "/openai/v1/completions", _QUESTION).status_code == 401, (
        "the first one's keys are not asked for"
    )
    second.uninstall()
    assert ask(shared.tenant, "/openai/v1/completions", _QUESTION).status_code == 200, (
        "the first one suffered from the second's end"
    )


def test_a_tenant_s_service_on_the_runtimes_of_another(
    suite: Suite, cluster: Cluster, shared: Shared, record: Record
) -> None:
    """The catalogue's manifest for CPUs, made small, in a namespace without a release."""
    namespace = suite.namespace("ten")
    manifest = yaml.safe_load((CATALOGUE / "cpu-demo.yaml").read_text())
    model = manifest["spec"]["predictor"]["model"]
    model["runtime"] = shared.release.values["runtimes"]["cpu"]["name"]
    little = small()
    model["resources"], model["env"] = little["resources"], little["env"]
    model["args"] += little["extraArgs"]
    cluster.apply(manifest, namespace)
    record("seconds to Ready", cluster.wait_ready(namespace, "cpu-demo"))
    answer = ask(suite.target(namespace, "cpu-demo"), "/openai/v1/completions", {**_QUESTION, "model": "cpu-demo"})
    assert answer.status_code == 200, answer.text
    assert "42" in json.dumps(answer.json())
    cluster.delete(manifest, namespace)


_SLOTS = 2
_RULES = {
    "hooks": [
        {"name": "secrets", "action": "refuse", "patterns": [{"literal": "project falcon", "ignore_case": True}]},
        {"name": "words", "action": "redact", "patterns": [{"literal": "apple", "replacement": "[fruit]"}]},
    ]
}


@pytest.fixture(scope="module")
def ruled(suite: Suite) -> Iterator[dict[str, Target]]:
    """A service with moderation, and tenants of the classes high and low behind two slots."""
    namespace = suite.namespace("ruled")
    keys = _make_keys(suite, namespace, {"first": {"priority": "high"}, "later": {"priority": "low"}})
    rules = client.V1ConfigMap(
        metadata=client.V1ObjectMeta(name="rules"), data={"moderation.yaml": yaml.safe_dump(_RULES)}
    )
    suite.cluster.core.create_namespaced_config_map(namespace, rules)
    service = small(
        apiKeys={"secretName": "keys"},
        moderation={"configMap": "rules"},
        extraArgs=["--enforce-eager", f"--max-concurrent={_SLOTS}"],
    )
    values = {"cluster": {"deploymentMode": "Standard", "gatewayAPI": True}, "inferenceServices": {NAME: service}}
    release = suite.release("ruled", namespace, values)
    release.install()
    suite.cluster.wait_ready(namespace, NAME)
    yield {who: suite.target(namespace, NAME, {"Authorization": f"Bearer {key}"}) for who, key in keys.items()}
    if not suite.keep:
        release.uninstall()


def test_moderation_through_the_gateway(ruled: dict[str, Target], record: Record) -> None:
    target = ruled["first"]
    refused = ask(target, "/openai/v1/completions", {**_QUESTION, "prompt": "Where is Project Falcon?"})
    record("a prompt that a rule refuses", f"{refused.status_code} {refused.json()['error']['type']}")
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "content_filter"
    assert "falcon" not in refused.text.lower()
    echo = {**_QUESTION, "prompt": "Repeat the word apple.", "echo": True}
    answer = ask(target, "/openai/v1/completions", echo).json()["choices"][0]["text"]
    record("one with a word that a rule replaces", repr(answer[:60]))
    assert "[fruit]" in answer
    assert "apple" not in answer
    assert ask(target, "/openai/v1/completions", _QUESTION).status_code == 200


def test_a_higher_class_waits_less(ruled: dict[str, Target], record: Record) -> None:
    with Load(ruled["later"], workers=8, stream=False, tokens=48, exactly=True) as many:
        while many.count.whole < 4:
            assert not many.count.lost, many.count.lost[:3]
            many.workers[0].join(0.1)
        few = Load(ruled["first"], workers=1, count=10, stream=False, tokens=48, exactly=True).run(120)
    assert not few.lost + many.count.lost, (few.lost + many.count.lost)[:3]
    high, low = statistics.median(few.seconds), statistics.median(many.count.seconds)
    record("seconds of an answer, median", f"class high {high:.2f}, low {low:.2f}; {_SLOTS} slots, 9 clients")
    assert high * 1.5 < low


def test_replicas_share_their_limits_in_redis(suite: Suite, request: pytest.FixtureRequest, record: Record) -> None:
    """Each of two pods alone would let as many requests pass as both together may."""
    url = request.config.option.redis
    if not url:
        pytest.skip("NOT RUN: no Redis that pods reach is named (--redis redis://HOST:PORT/0)")
    namespace = suite.namespace("redis")
    secret = client.V1Secret(metadata=client.V1ObjectMeta(name="redis"), string_data={"url": url})
    suite.cluster.core.create_namespaced_secret(namespace, secret)
    keys = _make_keys(suite, namespace, {"limited": {"limits": {"requests_per_minute": _PER_MINUTE}}})
    service = small(
        apiKeys={"secretName": "keys"}, redis={"secretName": "redis"}, autoscaling={"minReplicas": 2, "maxReplicas": 2}
    )
    values = {"cluster": {"deploymentMode": "Standard", "gatewayAPI": True}, "inferenceServices": {NAME: service}}
    release = suite.release("redis", namespace, values)
    release.install()
    suite.cluster.wait_ready(namespace, NAME)
    wait("two ready pods", lambda: suite.cluster.ready_pods(namespace, NAME) == 2, 300)
    target = suite.target(namespace, NAME, {"Authorization": f"Bearer {keys['limited']}"})
    count = Load(target, workers=6, count=30, stream=False, tokens=4, expected=(429,)).run(55)
    record(f"of 30 at {_PER_MINUTE} a minute, two pods", f"{count.whole} answered, {count.refused} refused with 429")
    assert not count.lost, count.lost[:3]
    assert count.whole == _PER_MINUTE
    release.uninstall()
