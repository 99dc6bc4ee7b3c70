"""The Job that rolls a new model out: it asks for no more than its Role allows, and for all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from kserve_vllm.ops.rollout import command
from kserve_vllm.ops.rollout.run import PAUSED, PROMOTED, ROLLED_BACK, STOPPED
from tests.charts import upgrades
from tests.charts.support import CHART, Document, of_kind, render, render_ci
from tests.charts.test_values import everything
from tests.ops.controllers import NAME, FakeKnative, FakeStandard
from tests.ops.fake_api import FakeApi
from tests.ops.test_rollout_run import GOOD, begin, rollout

SERVICE: dict[str, Document] = {
    "Knative": {"storageUri": "hf://a/old"},
    "Standard": {"model": "a/old", "deploymentMode": "Standard", "autoscaling": {"minReplicas": 4}},
}
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "GET": "get"}


def values(mode: str, **job: Any) -> Document:
    """A service that is rolled out."""
    new = "hf://a/new" if mode == "Knative" else "a/new"
    return {
        "cluster": {"gatewayAPI": True},
        "inferenceServices": {NAME: SERVICE[mode]},
        "rolloutJobs": {NAME: {"model": new, **job}},
    }


def the_job(documents: list[Document]) -> Document:
    (job,) = of_kind(documents, "Job").values()
    return job


def container_of(documents: list[Document]) -> Document:
    container: Document = the_job(documents)["spec"]["template"]["spec"]["containers"][0]
    return container


def asked(method: str, path: str) -> tuple[str, str, str, str]:
    """(verb, group, resource, name) of a request, as the API server's authorizer has them."""
    found = re.fullmatch(
        r"/(?:api/v1|apis/([^/]+)/[^/]+)/namespaces/[^/]+/([^/]+)(?:/([^/]+))?(?:/(\w+).*)?", urlsplit(path).path
    )
    assert found is not None, path
    group, resource, name, below = found.groups(default="")
    verb = VERBS[method]
    if verb == "get" and not name:
        verb = "list"
    return verb, group, f"{resource}/{below}" if below else resource, name.partition(":")[0]


def allowed_by(rules: list[Document], request: tuple[str, str, str, str]) -> list[int]:
    """Which rules allow a request; one that creates has no name that a rule could ask for."""
    verb, group, resource, name = request
    return [
        at
        for at, rule in enumerate(rules)
        if verb in rule["verbs"]
        and group in rule["apiGroups"]
        and resource in rule["resources"]
        and ("resourceNames" not in rule or (verb not in ("create", "list") and name in rule["resourceNames"]))
    ]


@pytest.mark.parametrize(("mode", "fake"), [("Knative", FakeKnative), ("Standard", FakeStandard)])
def test_the_role_allows_what_a_rollout_asks_for_and_nothing_else(mode: str, fake: Any, api: FakeApi) -> None:
    """A whole rollout against the fakes, each request of which is looked up in the Role."""
    fake(api, replicas=4) if mode == "Standard" else fake(api)
    (role,) = of_kind(render(values(mode)), "Role").values()
    api.reads.clear()
    run, driver, _ = rollout(api, lambda: GOOD)
    assert run.run(begin(driver, [10, 100])) == PROMOTED
    requests = {asked("GET", path) for path in api.reads} | {asked(method, path) for method, path, _ in api.writes}
    used: dict[int, set[str]] = {}
    for request in requests:
        rules = allowed_by(role["rules"], request)
        assert rules, f"the Role does not allow {request}"
        for at in rules:
            used.setdefault(at, set()).add(request[0])
    for at, rule in enumerate(role["rules"]):
        # A revision is read only where it is not ready at once.
        if rule["resources"] != ["revisions"]:
            assert set(rule["verbs"]) == used.get(at, set()), rule
        assert not {"*"} & {*rule["verbs"], *rule["resources"], *rule["apiGroups"]}


def test_answers_take_two_rights_more_and_only_then() -> None:
    plain, more = (
        next(iter(of_kind(render(values("Knative", **job)), "Role").values()))["rules"]
        for job in ({}, {"answers": {"configMap": "prompts"}})
    )
    assert more[: len(plain)] == plain
    assert [(r["resources"], r["verbs"]) for r in more[len(plain) :]] == [
        (["pods"], ["list"]),
        (["pods/proxy"], ["create"]),
    ]


def test_the_job_has_an_account_of_its_own_unless_one_is_named() -> None:
    documents = render(values("Knative"))
    pod = the_job(documents)["spec"]["template"]["spec"]
    (binding,) = of_kind(documents, "RoleBinding").values()
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": pod["serviceAccountName"], "namespace": "models"}]
    assert binding["roleRef"]["name"] in of_kind(documents, "Role")
    assert of_kind(documents, "ServiceAccount").keys() == {pod["serviceAccountName"]}
    # The one pod of the chart that gets a token.
    assert pod["automountServiceAccountToken"] is True
    mine = render(values("Knative", serviceAccountName="mine"))
    assert the_job(mine)["spec"]["template"]["spec"]["serviceAccountName"] == "mine"
    assert not {"Role", "RoleBinding", "ServiceAccount"} & {d["kind"] for d in mine}


@pytest.mark.parametrize("name", ["chat", "small"])
def test_the_program_takes_the_arguments_and_they_mean_its_own_defaults(name: str) -> None:
    jobs = of_kind(render_ci(CHART / "ci" / "rollout-values.yaml"), "Job")
    (container,) = [
        job["spec"]["template"]["spec"]["containers"][0] for at, job in jobs.items() if at.startswith(f"{name}-")
    ]
    assert container["command"] == ["kserve-vllm", "rollout"]
    given = vars(command.rollout_parser().parse_args(container["args"]))
    plain = vars(command.rollout_parser().parse_args([name]))
    assert given["name"] == name
    assert command.parse_steps(given["steps"]) == [1, 10, 50, 100]
    command.rollout_options(command.rollout_parser().parse_args(container["args"]), 4)
    told = {"namespace", "model", "arg", "id", "wait", "prometheus", "prometheus_token_file"}
    told |= {"answers", "answers_key_env", "min_equal", "on_inconclusive"}
    assert {key: value for key, value in given.items() if key not in told} == {
        key: value for key, value in plain.items() if key not in told
    }


def test_what_ends_a_rollout_ends_the_job_and_what_stops_it_does_not() -> None:
    policy, interrupted = the_job(render(values("Knative")))["spec"]["podFailurePolicy"]["rules"]
    codes = set(policy["onExitCodes"]["values"])
    assert policy["action"] == "FailJob"
    # 2 is what the program ends with for an argument that can't be used.
    assert codes == {ROLLED_BACK, PAUSED, 2}
    assert STOPPED not in codes
    assert interrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def test_the_same_rollout_keeps_its_id_and_another_attempt_or_model_does_not() -> None:
    def job(**changes: Any) -> tuple[str, str]:
        made = render(values("Knative", **changes))
        (found,) = [a for a in container_of(made)["args"] if a.startswith("--id=")]
        return found, the_job(made)["metadata"]["name"]

    first = job()
    gentler = job(steps=[5, 100], maxGap=2)
    assert first[0] == gentler[0], "what is under way goes on"
    assert first[1] != gentler[1], "a Job cannot change"
    assert len({first[0], job(attempt=2)[0], job(model="hf://a/other")[0], job(args=["--seed=1"])[0]}) == 4
    upgraded = [upgrades.reduced(render(values("Knative", **change))) for change in ({}, {"steps": [5, 100]})]
    assert not upgrades.broken_by(*upgraded)


def test_the_api_server_is_asked_without_the_proxy() -> None:
    documents = render({**values("Knative"), "proxy": {"httpsProxy": "http://proxy:3128"}})
    env = {e["name"]: e["value"] for e in container_of(documents)["env"]}
    assert env["NO_PROXY"] == env["no_proxy"]
    assert env["NO_PROXY"].endswith(".cluster.local,$(KUBERNETES_SERVICE_HOST)")
    isvc = of_kind(documents, "InferenceService")[NAME]["spec"]["predictor"]["model"]
    assert "KUBERNETES_SERVICE_HOST" not in json.dumps(isvc["env"])


def test_a_token_answers_and_certificates_are_mounted_where_the_arguments_say() -> None:
    job = {
        "prometheus": {"tokenSecret": {"name": "t", "key": "bearer"}},
        "answers": {"configMap": "prompts", "key": "p.txt", "apiKey": {"secretName": "k"}},
    }
    documents = render({**values("Standard", **job), "caBundle": {"secretName": "ca"}})
    pod = the_job(documents)["spec"]["template"]["spec"]
    container = pod["containers"][0]
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert volumes["prometheus"]["secret"] == {"secretName": "t"}
    assert volumes["answers"]["configMap"] == {"name": "prompts"}
    assert volumes["ca"]["secret"] == {"secretName": "ca"}
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    files = [a.partition("=")[2] for a in container["args"] if "=/etc/kserve-vllm/" in a]
    files += [e["value"] for e in container["env"] if e["name"] == "SSL_CERT_FILE"]
    assert {mounts[path.rpartition("/")[0]] for path in files} == {"prometheus", "answers", "ca"}
    assert {e["name"] for e in container["env"] if "valueFrom" in e} == {"ANSWERS_KEY"}


def test_a_service_of_another_release_may_be_rolled_out_and_notes_say_that_nothing_was_checked() -> None:
    alone = {"rolloutJobs": {"theirs": {"model": "hf://a/new"}}}
    (role,) = of_kind(render(alone), "Role").values()
    resources = {resource for rule in role["rules"] for resource in rule["resources"]}
    assert {"revisions", "deployments", "httproutes"} <= resources
    assert "inferenceServices.theirs is not in this release" in everything(alone)
    notes = everything(values("Knative")).split("NOTES:")[1]
    assert "is not in this release" not in notes
    assert f"job/{the_job(render(values('Knative')))['metadata']['name']}" in notes


def test_a_long_name_is_cut_and_stays_one_of_its_own() -> None:
    name = "a" * 48
    made = [
        render({"inferenceServices": {name: SERVICE["Knative"]}, "rolloutJobs": {name: {"model": model}}})
        for model in ("hf://a/new", "hf://a/other")
    ]
    jobs = {the_job(documents)["metadata"]["name"] for documents in made}
    assert len(jobs) == 2
    assert all(len(job) <= 63 for job in jobs)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """The fake API server of the operators' tests."""
    fake = FakeApi(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig))
    yield fake
    fake.stop()
