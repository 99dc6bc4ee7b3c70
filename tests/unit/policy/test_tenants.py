"""Keys, tenants and tiers: who is who, what a file may say, and what happens when it changes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kserve_vllm.core.errors import ConfigError, Unauthenticated
from kserve_vllm.core.request_context import Access, RequestContext, current
from kserve_vllm.core.types import Priority
from kserve_vllm.policy.enforcement import may_see
from kserve_vllm.policy.tenants import ANYONE, Caller, Limits, Tenants, digest, new_key, parse

KEY, OTHER, ADMIN = new_key(), new_key(), new_key()
ONE, TWO = (f"tenant: t, sha256: {digest(name)}" for name in "xy")
FILE = f"""
tiers:
  gold: {{priority: high, may_choose_priority: true, limits: {{requests_per_minute: 600, concurrent: 8}}}}
tenants:
  team-a: {{tier: gold, models: ["demo*", upper], limits: {{requests_per_minute: 60}}}}
keys:
  - {{id: a-1, tenant: team-a, sha256: {digest(KEY)}, models: ["demo"], limits: {{tokens_per_minute: 5}}}}
  - {{id: a-2, tenant: team-a, sha256: {digest(OTHER)}}}
  - {{id: ops, tenant: ops, sha256: {digest(ADMIN)}, admin: true}}
"""


def tenants(tmp_path: Path, text: str = FILE) -> Tenants:
    """Tenants of a file with this text."""
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    return Tenants(str(path))


def test_a_key_names_its_tenant_with_what_tier_tenant_and_key_say(tmp_path: Path) -> None:
    caller = tenants(tmp_path).identify(KEY)
    assert (caller.tenant, caller.key_id, caller.admin) == ("team-a", "a-1", False)
    assert caller.priority is Priority.HIGH
    assert caller.may_choose_priority
    assert caller.tenant_limits == Limits(requests_per_minute=60, concurrent=8)
    assert caller.key_limits == Limits(tokens_per_minute=5)


def test_two_keys_of_a_tenant_are_valid_at_once_and_differ_in_their_own_part(tmp_path: Path) -> None:
    known = tenants(tmp_path)
    first, second = known.identify(KEY), known.identify(OTHER)
    assert first.tenant == second.tenant
    assert second.may_use(["demo-large"])
    assert not first.may_use(["demo-large"])
    assert first.may_use(["demo"])
    assert not second.may_use(["french"])


def test_who_may_use_a_model_or_is_an_administrator_gets_to_know_of_it(tmp_path: Path) -> None:
    file = tenants(tmp_path, FILE.replace("keys:", "  ops: {models: []}\nkeys:"))
    engine: Any = SimpleNamespace(names=["org/base", "demo"])

    def seen(caller: Caller | None) -> list[str]:
        context = RequestContext("r", "openai", "/v1/models", access=Access(caller=caller))
        token = current.set(context)
        try:
            return [name for name in ("org/base", "demo", "upper", "french") if may_see(engine, name)]
        finally:
            current.reset(token)

    everything = ["org/base", "demo", "upper", "french"]
    assert seen(file.identify(KEY)) == ["org/base", "demo"]
    assert seen(file.identify(OTHER)) == ["org/base", "demo", "upper"]
    assert file.identify(ADMIN).models == ((),)
    assert seen(file.identify(ADMIN)) == everything
    assert seen(ANYONE) == everything
    assert seen(None) == everything
    assert may_see(engine, "french")  # in no request


def test_a_model_is_allowed_under_any_of_its_names(tmp_path: Path) -> None:
    assert tenants(tmp_path).identify(OTHER).may_use(["org/demo", "demo"])


@pytest.mark.parametrize(
    "key",
    [None, "", "kv-wrong", KEY[:-1], KEY + "x", digest(KEY), "\udcff"],
    ids=["none", "empty", "wrong", "cut", "longer", "digest", "no text"],
)
def test_a_missing_or_wrong_key_is_refused(tmp_path: Path, key: str | None) -> None:
    with pytest.raises(Unauthenticated):
        tenants(tmp_path).identify(key)


def test_without_keys_everyone_is_anyone() -> None:
    assert Tenants().identify(None) is ANYONE
    assert not Tenants().needed


def test_plain_keys_are_no_administrators() -> None:
    caller = Tenants(plain=["secret"]).identify("secret")
    assert not caller.admin
    with pytest.raises(Unauthenticated):
        Tenants(plain=["secret"]).identify("other")


def test_an_expired_key_is_refused_and_named_by_its_id(tmp_path: Path) -> None:
    text = f"keys: [{{id: old, tenant: a, sha256: {digest(KEY)}, expires: 2020-01-01T00:00:00Z}}]"
    with pytest.raises(Unauthenticated, match="'old' has expired"):
        tenants(tmp_path, text).identify(KEY)


def test_a_changed_file_holds_after_reload_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    known = tenants(tmp_path)
    path = tmp_path / "keys.yaml"
    assert not known.reload()
    path.write_text("keys: [")
    assert not known.reload()
    assert known.failures == 1
    assert known.identify(KEY).tenant == "team-a"
    path.write_text(f"keys: [{{id: new, tenant: b, sha256: {digest('kv-new')}}}]")
    assert known.reload()
    assert known.identify("kv-new").tenant == "b"
    with pytest.raises(Unauthenticated):
        known.identify(KEY)


def test_a_swapped_link_as_of_a_mounted_secret_is_noticed(tmp_path: Path) -> None:
    for name, key in (("one", KEY), ("two", OTHER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys.yaml").write_text(f"keys: [{{id: k, tenant: t-{name}, sha256: {digest(key)}}}]")
    (tmp_path / "data").symlink_to("one")
    known = Tenants(str(tmp_path / "data" / "keys.yaml"))
    (tmp_path / "new").symlink_to("two")
    os.replace(tmp_path / "new", tmp_path / "data")
    assert known.reload()
    assert known.identify(OTHER).tenant == "t-two"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("keys: [{id: a, tenant: t, sha256: abc}]", "keys.0.sha256"),
        (f"keys: [{{id: a, tenant: t, sha256: {digest('x')}, color: red}}]", "keys.0.color"),
        ("tenants: {t: {tier: lead}}", "tier 'lead', which is not among tiers"),
        ("tenants: {t: {priority: urgent}}", "tenants.t.priority"),
        ("tenants: {t: {limits: {requests_per_minute: 0}}}", "requests_per_minute"),
        ("keys: [", "neither YAML nor JSON: line"),
        ('{"keys": [}', "neither YAML nor JSON: line 1"),
        ("- a", "the file"),
        (
            f"keys: [{{id: a, tenant: t, sha256: {digest('x')}}}, {{id: a, tenant: t, sha256: {digest('y')}}}]",
            "two keys",
        ),
        (f"keys: [{{id: a, {ONE}}}, {{id: b, {ONE}}}]", "twice"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_that_names_the_place(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        parse(text, "keys.yaml")
    assert digest("x") not in str(caught.value)


def test_a_missing_file_is_an_error_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        Tenants(str(tmp_path / "none.yaml"))


@pytest.mark.slow
def test_a_hundred_thousand_keys_cost_no_more_per_request_than_ten(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        keys = [{"id": f"k{i}", "tenant": f"t{i % 100}", "sha256": digest(f"kv-{i}")} for i in range(count)]
        path = tmp_path / f"{count}.json"
        path.write_text(json.dumps({"keys": keys}))
        known = Tenants(str(path))
        best = 1e9
        for _ in range(7):
            started = time.perf_counter()
            for i in range(2000):
                known.identify(f"kv-{i % count}")
            best = min(best, time.perf_counter() - started)
        return best / 2000

    # Generous: a scan of the keys would be 10,000 times slower, the processor's caches make it somewhat so.
    assert seconds(100_000) < 10 * seconds(10)
