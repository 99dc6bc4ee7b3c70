"""The rollout from step to step: in both modes, killed anywhere, and with everything that can go wrong.

The API server and the controllers are fakes, and so is what is judged by here (`Scripted`); the judge with a real
Prometheus is in test_rollout_prometheus.py.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from kserve_vllm.cli import main
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.cluster import ApiError, Cluster, path_of
from kserve_vllm.ops.rollout.command import change_of
from kserve_vllm.ops.rollout.judge import Thresholds
from kserve_vllm.ops.rollout.modes import driver_of, inverse, merged
from kserve_vllm.ops.rollout.prometheus import PrometheusError, Sample
from kserve_vllm.ops.rollout.run import PAUSED, PROMOTED, ROLLED_BACK, STOPPED, Options, Rollout, Stop
from kserve_vllm.ops.rollout.state import RolloutState, StateStore, Superseded
from tests.ops.controllers import NAME, NAMESPACE, FakeKnative, FakeStandard
from tests.ops.fake_api import TOKEN, FakeApi
from tests.support import self_signed

GOOD = Sample({"ok": 1000}, pods=1)
BAD = Sample({"ok": 900, "server_error": 100}, pods=1)
FEW = Sample({"ok": 3}, pods=1)


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(0.01, seconds)


class Scripted:
    """A fake Prometheus: gives the canary what the test says, and the stable version what is good."""

    def __init__(self, canary: Callable[[], Sample], stable: str) -> None:
        self._canary, self._stable = canary, stable

    def sample(self, namespace: str, service: str, revision: str, since: float, until: float) -> Sample:
        assert since <= until
        return GOOD if revision == self._stable else self._canary()


class Killed(BaseException):
    """The process is gone: nothing of it runs any more."""


def begin(driver: Any, steps: list[int]) -> RolloutState:
    """The state of a rollout that begins."""
    predictor = driver.isvc()["spec"]["predictor"]
    change = change_of(predictor, "hf://a/new" if driver.mode == "Knative" else "a/new", None, [])
    stable, newest = driver.stable(), driver.newest()
    return RolloutState(driver.mode, change, "model new", stable, inverse(predictor, change), steps, newest=newest)


def rollout(
    api: FakeApi, canary: Callable[[], Sample], lines: list[str] | None = None, **options: Any
) -> tuple[Rollout, Any, StateStore]:
    """A rollout over the fakes, its driver and its store."""
    cluster = Cluster(kubeconfig=str(api.kubeconfig))
    driver = driver_of(cluster, NAMESPACE, NAME)
    store = StateStore(cluster, NAMESPACE, NAME)
    kept = store.load()
    clock = Clock()
    chosen = Options(
        **{
            "interval_s": 10,
            "initial_delay_s": 1,
            "count": 3,
            "poll_s": 1,
            "progress_deadline_s": 60,
            "patience_s": 5,
            **options,
        }
    )
    stable = kept.stable if kept else driver.stable()
    said = lines.append if lines is not None else lambda line: None
    scripted: Any = Scripted(canary, stable)
    return (
        Rollout(driver, store, scripted, NAMESPACE, NAME, chosen, None, said, clock, clock.sleep),
        driver,
        store,
    )


def test_a_good_canary_is_promoted_in_knative_mode(api: FakeApi) -> None:
    world = FakeKnative(api)
    lines: list[str] = []
    run, driver, store = rollout(api, lambda: GOOD, lines)
    assert run.run(begin(driver, [1, 10, 50, 100])) == PROMOTED
    assert world.shifts == [0, 1, 10, 50, 100]
    isvc = api.get("InferenceService", NAME)
    assert "canaryTrafficPercent" not in isvc["spec"]["predictor"]
    assert isvc["spec"]["predictor"]["model"]["storageUri"] == "hf://a/new"
    assert world.revisions == 2, "no step makes a revision of its own"
    assert world.share("chat-predictor-00002") == 100
    state = store.load()
    assert state is not None
    assert state.phase == "Succeeded"
    assert [entry["weight"] for entry in state.history if entry["event"] == "shifted"] == [1, 10, 50, 100]
    owner = api.get("ConfigMap", "chat-rollout")["metadata"]["ownerReferences"][0]
    assert (owner["kind"], owner["uid"]) == ("InferenceService", "u-1")
    assert any("Fisher's exact p" in line for line in lines), "the verdict's numbers are said"


def test_a_good_canary_is_promoted_in_standard_mode(api: FakeApi) -> None:
    world = FakeStandard(api, replicas=4)
    run, driver, _ = rollout(api, lambda: GOOD)
    assert run.run(begin(driver, [10, 50, 100])) == PROMOTED
    # Up by steps, and back pod by pod once the stable Deployment has the new model too.
    assert world.weights == [0, 10, 50, 100, 75, 50, 25]
    assert max(world.canary_replicas) == 4, "pods come with the weight"
    # (pods of the stable Deployment with the new model, percent of the traffic): never more than it can carry.
    assert world.handed_over == [(1, 0), (1, 25), (2, 50), (3, 75), (4, 100)]
    spec = api.get("InferenceService", NAME)["spec"]
    assert "canary" not in spec
    assert spec["predictor"]["model"]["args"] == ["--model=a/new", "--max-num-seqs", "64"]


@pytest.mark.parametrize("fake", [FakeKnative, FakeStandard])
def test_a_canary_that_errs_is_rolled_back(fake: Any, api: FakeApi) -> None:
    world = fake(api)
    lines: list[str] = []
    run, driver, store = rollout(api, lambda: BAD, lines)
    assert run.run(begin(driver, [10, 100])) == ROLLED_BACK
    state = store.load()
    assert state is not None
    assert (state.phase, state.step) == ("Failed", 0)
    assert state.reason.startswith("error-rate: canary 10.00 %")
    if fake is FakeKnative:
        assert world.restored()
        assert world.most["chat-predictor-00002"] == 10, "and on the way back the canary got no more"
    else:
        assert "canary" not in api.get("InferenceService", NAME)["spec"]
        assert world.weights == [0, 10, 0]


def test_one_that_errs_only_with_all_traffic_is_rolled_back_too(api: FakeApi) -> None:
    world = FakeKnative(api)
    looks = iter([GOOD, GOOD, BAD])
    lines: list[str] = []
    run, driver, store = rollout(api, lambda: next(looks), lines)
    assert run.run(begin(driver, [10, 50, 100])) == ROLLED_BACK
    assert world.share("chat-predictor-00001") == 100
    assert store.load().step == 2  # type: ignore[union-attr]
    # KServe calls the canary the last revision rolled out: beside a third one it would have all traffic again.
    assert world.revisions == 2
    assert "keeps its canary, without traffic: chat-predictor-00002 had all traffic" in lines[-1]


def test_one_that_never_gets_ready_is_rolled_back_and_keeps_no_pod(api: FakeApi) -> None:
    world = FakeKnative(api, ready="Initial scale was never achieved")
    run, driver, store = rollout(api, lambda: GOOD)
    assert run.run(begin(driver, [10, 100])) == ROLLED_BACK
    assert world.shifts == [0]
    assert world.restored()
    assert "Initial scale was never achieved" in store.load().reason  # type: ignore[union-attr]
    deleted = [path.rsplit("/", 1)[1] for method, path, _ in api.writes if method == "DELETE"]
    assert deleted == ["chat-predictor-00002"]


def test_where_a_revision_may_not_be_deleted_its_command_is_printed(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise ApiError(403, "revisions is forbidden")

    monkeypatch.setattr(Cluster, "delete", forbidden)
    FakeKnative(api, ready="Initial scale was never achieved")
    lines: list[str] = []
    run, driver, _ = rollout(api, lambda: GOOD, lines=lines)
    assert run.run(begin(driver, [10, 100])) == ROLLED_BACK
    assert any("kubectl delete revision chat-predictor-00002 -n team-a" in line for line in lines), lines


def test_a_revision_that_was_there_before_is_not_taken_for_the_canary(api: FakeApi) -> None:
    """A change at 0 % that somebody has left, or a rollout whose way back was not through."""
    world = FakeKnative(api)
    cluster = Cluster(kubeconfig=str(api.kubeconfig))
    left = {"minReplicas": 2, "canaryTrafficPercent": 0}
    cluster.patch("InferenceService", NAMESPACE, NAME, {"spec": {"predictor": left}})
    assert world.share("chat-predictor-00001") == 100
    # The controller is slow: when the rollout looks first, the newest revision is still that one, and it is ready.
    turn, world.reconcile = world.reconcile, lambda: None  # type: ignore[method-assign]
    run, driver, store = rollout(api, lambda: GOOD)
    state = begin(driver, [50, 100])
    driver.start(state)
    assert driver.ready(state) == ""
    world.reconcile = turn  # type: ignore[method-assign]
    world.reconcile()
    assert driver.ready(state) == "chat-predictor-00003"
    assert run.run(state) == PROMOTED
    assert store.load().canary == "chat-predictor-00003"  # type: ignore[union-attr]
    assert world.share("chat-predictor-00003") == 100


def test_a_way_back_that_takes_too_long_is_gone_on_with(api: FakeApi) -> None:
    """The old version's new revision is a pod that starts: the traffic is back before, and the failed one is gone."""
    world = FakeKnative(api, ready="Initial scale was never achieved")
    lines: list[str] = []
    run, driver, store = rollout(api, lambda: GOOD, lines)
    restore, driver.restore = driver.restore, lambda state: restore(state) and False
    assert run.run(begin(driver, [10, 100])) == STOPPED
    assert world.share("chat-predictor-00002") == 0
    assert "Run the command again to go on" in lines[-1]
    assert [path.rsplit("/", 1)[1] for method, path, _ in api.writes if method == "DELETE"] == ["chat-predictor-00002"]
    kept = store.load()
    assert kept is not None
    assert kept.phase == "RollingBack"
    driver.restore = restore
    assert run.run(kept) == ROLLED_BACK
    assert world.restored()
    assert store.load().phase == "Failed"  # type: ignore[union-attr]


def test_a_canary_that_was_ready_keeps_its_revision(api: FakeApi) -> None:
    FakeKnative(api)
    run, driver, _ = rollout(api, lambda: BAD)
    assert run.run(begin(driver, [10, 100])) == ROLLED_BACK
    assert [method for method, *_ in api.writes if method == "DELETE"] == []


def test_a_standard_canary_that_never_gets_ready_is_taken_away(api: FakeApi) -> None:
    FakeStandard(api, ready=False)
    run, driver, store = rollout(api, lambda: GOOD)
    assert run.run(begin(driver, [10, 100])) == ROLLED_BACK
    assert "canary" not in api.get("InferenceService", NAME)["spec"]
    assert "timed out progressing" in store.load().reason  # type: ignore[union-attr]


def test_a_kserve_that_splits_no_traffic_promotes_nothing(api: FakeApi) -> None:
    FakeStandard(api, splits=False)
    run, driver, store = rollout(api, lambda: GOOD)
    assert run.run(begin(driver, [10, 100])) == ROLLED_BACK
    assert "the traffic is not split at 10 %" in store.load().reason  # type: ignore[union-attr]


def test_a_kserve_without_canaries_is_a_sentence(api: FakeApi) -> None:
    FakeStandard(api, has_canary=False)
    api.refusal = None
    run, driver, _ = rollout(api, lambda: GOOD)
    # The schema of an old KServe drops the field: as its API server answers.
    answer = api.answer

    def pruned(method: str, target: str, body: Any) -> tuple[int, Any]:
        status, out = answer(method, target, body)
        if method == "PATCH" and isinstance(out, dict):
            out = json.loads(json.dumps(out))
            out.get("spec", {}).pop("canary", None)
        return status, out

    api.answer = pruned  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"KServe 0\.21"):
        run.run(begin(driver, [10, 100]))


@pytest.mark.parametrize(
    ("policy", "code", "phase"),
    [("rollback", ROLLED_BACK, "Failed"), ("pause", PAUSED, "Paused"), ("promote", PROMOTED, "Succeeded")],
)
def test_too_few_samples_end_as_was_asked(policy: Any, code: int, phase: str, api: FakeApi) -> None:
    FakeKnative(api)
    run, driver, store = rollout(api, lambda: FEW, on_inconclusive=policy)
    assert run.run(begin(driver, [10, 100])) == code
    state = store.load()
    assert state is not None
    assert state.phase == phase
    if policy == "pause":
        assert "100 samples of each are needed" in state.reason
        again, _, store = rollout(api, lambda: GOOD)
        assert again.run(store.load()) == PROMOTED  # type: ignore[arg-type]


def test_a_prometheus_that_is_away_promotes_nothing(api: FakeApi) -> None:
    FakeKnative(api)

    def away() -> Sample:
        raise PrometheusError("it does not answer")

    run, driver, store = rollout(api, away)
    assert run.run(begin(driver, [10, 100])) == ROLLED_BACK
    assert "it does not answer" in store.load().reason  # type: ignore[union-attr]


def test_failed_looks_up_to_the_threshold_are_looked_at_again(api: FakeApi) -> None:
    FakeKnative(api)
    looks = iter([BAD, GOOD, GOOD, GOOD])
    run, driver, _ = rollout(api, lambda: next(looks), threshold=2)
    assert run.run(begin(driver, [10, 100])) == PROMOTED


def test_a_change_by_someone_else_pauses(api: FakeApi) -> None:
    world = FakeKnative(api)

    def meddle() -> Sample:
        isvc = api.get("InferenceService", NAME)
        isvc["spec"]["predictor"]["minReplicas"] = 3
        api.put("InferenceService", isvc)
        world.reconcile()
        return GOOD

    run, driver, store = rollout(api, meddle)
    assert run.run(begin(driver, [10, 50, 100])) == PAUSED
    state = store.load()
    assert state is not None
    assert state.phase == "Paused"
    assert "the newest revision is chat-predictor-00003" in state.reason


def _killing(api: FakeApi, after: int) -> None:
    """Ends the process at the write with this number: right after the cluster has it, before anything else."""
    writes, then = 0, api.on_write

    def count(method: str, path: str, body: Any) -> None:
        nonlocal writes
        then(method, path, body)
        writes += 1
        if writes == after:
            api.dead = True  # type: ignore[attr-defined]

    api.dead = False  # type: ignore[attr-defined]
    api.on_write = count


@pytest.mark.parametrize("fake", [FakeKnative, FakeStandard])
@pytest.mark.parametrize(("canary", "code"), [(GOOD, PROMOTED), (BAD, ROLLED_BACK)], ids=["good", "bad"])
def test_a_rollout_that_is_killed_after_any_write_goes_on(
    fake: Any, canary: Sample, code: int, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(self: Cluster, method: str, path: str, query: Any, body: Any = None, *_: Any, **__: Any) -> Any:
        """The fake without HTTP, which would take minutes here."""
        status, answer = api.answer(method, path + ("?" + urlencode(query) if query else ""), body)
        if getattr(api, "dead", False):
            raise Killed
        if status >= 400:
            raise ApiError(status, answer["message"])
        return status, json.dumps(answer)

    monkeypatch.setattr(Cluster, "fetch_text", dying)
    ended = 0
    for after in range(1, 60):
        api.objects.clear()
        world = fake(api)
        _killing(api, after)
        run, driver, _ = rollout(api, lambda: canary)
        try:
            assert run.run(begin(driver, [10, 100])) == code
            ended = after
            break
        except Killed:
            api.dead = False  # type: ignore[attr-defined]
        run, driver, store = rollout(api, lambda: canary)
        state = store.load()
        if state is None:
            state = begin(driver, [10, 100])
        assert run.run(state) == code, f"killed after write {after}"
        spec = api.get("InferenceService", NAME)["spec"]
        new = "new" in json.dumps(spec["predictor"]["model"])
        if fake is FakeKnative:
            share = world.share("chat-predictor-00002")
            assert share == (100 if code == PROMOTED else 0), f"killed after write {after}"
            assert code == PROMOTED or world.restored(), f"killed after write {after}"
            assert world.revisions == (2 if code == PROMOTED else 3)
        else:
            assert "canary" not in spec
            assert new == (code == PROMOTED), f"killed after write {after}"
    assert ended > 5, "there were writes to be killed after, and all were tried"


def test_two_at_a_time_the_older_one_ends(api: FakeApi) -> None:
    FakeKnative(api)

    def intrude() -> Sample:
        store = StateStore(Cluster(kubeconfig=str(api.kubeconfig)), NAMESPACE, NAME)
        state = store.load()
        assert state is not None
        store.save(state, driver.isvc())
        return GOOD

    first, driver, _ = rollout(api, intrude)
    with pytest.raises(Superseded):
        first.run(begin(driver, [10, 100]))


def test_an_api_server_that_is_away_for_a_while_ends_nothing(api: FakeApi) -> None:
    world = FakeKnative(api)
    answer, failures = api.answer, 0

    def flaky(method: str, target: str, body: Any) -> tuple[int, Any]:
        nonlocal failures
        failures += 1
        return (503, api.status(503, "etcd is away")) if failures % 3 == 0 else answer(method, target, body)

    run, driver, _ = rollout(api, lambda: GOOD)
    state = begin(driver, [10, 100])
    api.answer = flaky  # type: ignore[method-assign]
    assert run.run(state) == PROMOTED
    assert world.share("chat-predictor-00002") == 100


def test_stopping_keeps_the_weight_and_the_place(api: FakeApi) -> None:
    world = FakeKnative(api)
    looks = 0

    def stop_at_the_second() -> Sample:
        nonlocal looks
        looks += 1
        if looks == 2:
            raise Stop
        return GOOD

    lines: list[str] = []
    run, driver, _ = rollout(api, stop_at_the_second, lines)
    assert run.run(begin(driver, [10, 50, 100])) == STOPPED
    assert world.share("chat-predictor-00002") == 50
    assert "stopped at 50 %" in lines[-1]
    again, _, store = rollout(api, lambda: GOOD)
    assert again.run(store.load()) == PROMOTED  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command looks at the cluster again sooner than it would."""
    sleep = time.sleep

    def shorter(seconds: float) -> None:
        sleep(min(seconds, 0.05))

    monkeypatch.setattr(time, "sleep", shorter)
    monkeypatch.setattr("kserve_vllm.ops.rollout.command.Rollout", functools.partial(Rollout, sleep=shorter))


def command(api: FakeApi, *arguments: str) -> int:
    """The command, with a Prometheus that is not asked."""
    return main(["rollout", NAME, "--prometheus", "http://127.0.0.1:9", *arguments])


def test_abort_gives_all_traffic_back(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    world = FakeKnative(api)
    run, driver, _ = rollout(api, lambda: FEW, on_inconclusive="pause")
    run.run(begin(driver, [10, 100]))
    assert world.share("chat-predictor-00002") == 10
    assert command(api, "--status") == 0
    assert "Paused, step 1 of 2 (10 %)" in capsys.readouterr().out
    assert command(api, "--model", "hf://a/third") == 2
    assert "is under way" in capsys.readouterr().err
    assert command(api, "--abort") == ROLLED_BACK
    assert world.restored()
    assert command(api, "--abort") == 2


def test_what_an_id_began_is_begun_once_and_stays_paused(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    """A Job's pod that is run again, or a Job that is written again after its end."""
    world = FakeKnative(api)
    run, driver, store = rollout(api, lambda: FEW, on_inconclusive="pause")
    state = begin(driver, [10, 100])
    state.id = "one"
    assert run.run(state) == PAUSED
    job = ("--model", "hf://a/new", "--id")
    assert command(api, *job, "one") == PAUSED
    assert "the rollout one is paused" in capsys.readouterr().out
    # Nobody else's Job goes on with it, and a person does.
    assert command(api, *job, "two") == 2
    assert "another rollout of chat is under way" in capsys.readouterr().err
    assert world.share("chat-predictor-00002") == 10
    assert command(api, "--abort") == ROLLED_BACK
    revisions = world.revisions
    assert command(api, *job, "one") == ROLLED_BACK
    assert "the rollout one is over: Failed" in capsys.readouterr().out
    assert world.revisions == revisions
    # It is known after others too.
    kept = store.load()
    assert kept is not None
    later = RolloutState(
        driver.mode,
        kept.change,
        "x",
        kept.stable,
        kept.before,
        [100],
        phase="Succeeded",
        id="two",
        ended=kept.endings(),
    )
    store.save(later, driver.isvc())
    assert command(api, *job, "one") == ROLLED_BACK
    assert command(api, *job, "two") == PROMOTED


def test_it_waits_for_a_service_that_is_not_there_yet(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    FakeKnative(api)
    isvc = api.get("InferenceService", NAME)
    there = path_of("InferenceService", NAMESPACE, NAME)
    del api.objects[there]
    job = ("--model", "hf://a/old", "--wait")
    assert command(api, *job, "0") == 2
    assert "there is no InferenceService" in capsys.readouterr().err
    asked = 0
    answer = api.answer

    def later(method: str, target: str, body: Any) -> tuple[int, Any]:
        nonlocal asked
        asked += target == there
        if asked == 2:
            api.objects[there] = isvc
        return answer(method, target, body)

    api.answer = later  # type: ignore[method-assign]
    assert command(api, *job, "60") == 2
    captured = capsys.readouterr()
    assert "waiting for chat to be ready" in captured.out
    assert "nothing would change" in captured.err


def test_in_a_pod_the_account_of_the_pod_is_used(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the token, the authority and the namespace that Kubernetes mounts, over TLS."""
    certificate, key = self_signed(tmp_path)
    account = tmp_path / "serviceaccount"
    account.mkdir()
    (account / "token").write_text(TOKEN)
    (account / "namespace").write_text(NAMESPACE)
    (account / "ca.crt").write_bytes(certificate.read_bytes())
    FakeKnative(api)
    port = api.over_tls(certificate, key)
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "nowhere/config"))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(account / "token"))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(account / "ca.crt"))
    monkeypatch.setattr("kserve_vllm.ops.cluster.NAMESPACE_FILE", str(account / "namespace"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "localhost")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))
    assert command(api, "--status") == 0
    assert "there was no rollout of chat" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    world = FakeKnative(api)
    assert command(api, "--model", "hf://a/new", "--dry-run") == 2
    captured = capsys.readouterr()
    assert "does not answer" in captured.err
    assert 'canary   {"model": {"storageUri": "hf://a/new"}}' in captured.out
    assert api.writes == []
    assert world.revisions == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "hf://a/old"], "nothing would change"),
        ([], "no rollout of chat under way"),
        (["--model", "/a/folder"], "is a storage address"),
        (["--model", "hf://a/b", "--steps", "10,5"], "have to rise"),
        (["--model", "hf://a/b", "--steps", "ten"], "whole percents"),
        (["--model", "hf://a/b", "--max-gap", "0.5"], "1 or more"),
        (["--model", "hf://a/b", "--threshold", "9"], "can't be reached"),
        (["--arg=max-num-seqs=3"], "begins with two dashes"),
        (["--model", "hf://a/b", "--answers", "/nowhere"], "can't be read"),
    ],
)
def test_what_can_not_be_rolled_out_is_said_and_nothing_written(
    arguments: list[str], words: str, api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeKnative(api)
    assert command(api, *arguments) == 2
    assert words in capsys.readouterr().err
    assert api.writes == []


def test_without_prometheus_there_is_no_rollout(
    api: FakeApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KSERVE_VLLM_PROMETHEUS", raising=False)
    FakeKnative(api)
    assert main(["rollout", NAME, "--model", "hf://a/new"]) == 2
    assert "judged by Prometheus" in capsys.readouterr().err


def test_missing_rights_are_said(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    FakeKnative(api)
    api.forbidden.add("/api/v1|configmaps")
    assert command(api, "--model", "hf://a/new") == STOPPED
    assert "the cluster refuses: 403" in capsys.readouterr().err


def test_a_service_that_is_not_ready_is_not_rolled_out(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    FakeKnative(api)
    isvc = api.get("InferenceService", NAME)
    isvc["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
    api.put("InferenceService", isvc)
    assert command(api, "--model", "hf://a/new") == 2
    assert "kserve-vllm diagnose chat" in capsys.readouterr().err


def test_answers_are_compared_before_there_is_traffic(
    api: FakeApi, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    world = FakeKnative(api)
    for number in (1, 2):
        api.put(
            "Pod",
            {
                "metadata": {
                    "name": f"pod-{number}",
                    "labels": {
                        "serving.kserve.io/inferenceservice": NAME,
                        "serving.knative.dev/revision": f"chat-predictor-0000{number}",
                    },
                },
                "status": {"conditions": [{"type": "Ready", "status": "True"}]},
            },
        )

    asked: list[tuple[str, Any]] = []

    def talk(path: str, body: Any) -> tuple[int, Any]:
        asked.append((path, body))
        assert body["temperature"] == 0
        said = "I'm sorry, I can't help with that." if path.startswith("pod-2") else "four"
        message = {"message": {"content": said}} if "messages" in body else {"text": said}
        return 200, {"choices": [{**message, "finish_reason": "stop"}]}

    api.post_to_pod = talk
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('2 + 2\n{"messages": [{"role": "user", "content": "2 + 2"}]}\n')
    assert command(api, "--model", "hf://a/new", "--answers", str(prompts)) == ROLLED_BACK
    out = capsys.readouterr().out
    assert "answers-equal: Successful. 0.0 % of 2 answers are equal" in out
    assert "answers-refused: Failed. 100.0 % refused, stable 0.0 %" in out
    assert world.shifts == [0], "no client met it"
    assert {path for path, _ in asked} == {
        f"pod-{n}:8080/proxy/v1/{what}" for n in (1, 2) for what in ("completions", "chat/completions")
    }


def test_a_change_and_its_inverse_are_merge_patches() -> None:
    predictor = {"model": {"args": ["--model=a", "--max-num-seqs", "64"], "image": "x"}}
    change = change_of(predictor, "b", "y", ["--max-num-seqs=8", "--enforce-eager"])
    assert change["model"] == {"args": ["--model=b", "--max-num-seqs=8", "--enforce-eager"], "image": "y"}
    assert merged(merged(predictor, change), inverse(predictor, change)) == predictor
    fresh = change_of({"model": {}}, None, None, ["--enforce-eager"])
    assert merged(merged({"model": {}}, fresh), inverse({"model": {}}, fresh)) == {"model": {}}
    assert change_of({"model": {"storageUri": "hf://a/b"}}, "c/d", None, [])["model"] == {"storageUri": "hf://c/d"}


def test_the_confidence_is_shared_among_all_looks() -> None:
    assert Thresholds(confidence=0.95, looks=20).alpha == pytest.approx(0.05 / 120)


def test_a_slip_in_the_arguments_is_named_without_a_cluster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    for words, said in ((["--steps", "10,5"], "percents have to rise"), (["--confidence", "2"], "between 0 and 1")):
        assert main(["rollout", "chat", "--model", "hf://a/b", *words]) == 2
        assert said in capsys.readouterr().err
