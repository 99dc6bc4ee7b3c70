"""`kserve-vllm diagnose` as it is called: through the real Kubernetes client, against recorded objects over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from kserve_vllm.cli import main
from kserve_vllm.ops.diagnose import snapshot as snapshots
from kserve_vllm.ops.diagnose.causes import judge
from tests.ops.fake_api import FakeApi
from tests.ops.snapshots import CASES, snapshot
from tests.support import ROOT

# Of each way to find a thing one, through HTTP and back.
THROUGH_HTTP = [
    "gpu-short",
    "token-missing",
    "streams-cut",
    "canary-no-split",
    "queue-full",
    "secret-absent",
    "image-absent",
    "knative-flag-off",
    "redis-down",
    "host-oom",
    "runtime-absent",
    "hpa-name-taken",
]


def case_of(cause: str | None) -> dict[str, Any]:
    """The first case of a cause."""
    return next(case for case in CASES if case["cause"] == cause)


def diagnose(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON of a diagnosis."""
    code = main(["diagnose", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("cause", THROUGH_HTTP)
def test_a_recorded_case_is_found_through_the_api_server(
    cause: str, api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = snapshot(case_of(cause))
    # Events are of now: the clock of the test is later than that of the case.
    for event in taken.objects.get("Event", []):
        event["lastTimestamp"] = snapshots.Snapshot("", "", "").now.isoformat()
    api.serve(taken)
    code, body = diagnose(capsys, "chat")
    assert body["findings"][0]["cause"] == cause
    assert code == (0 if body["findings"][0]["severity"] == "risk" else 1)
    assert api.writes == [], "diagnose only reads"


def test_a_healthy_service_gives_zero_and_only_reads(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.serve(snapshot(case_of(None)))
    code, body = diagnose(capsys, "chat")
    assert (code, body["findings"], body["ready"], body["mode"]) == (0, [], True, "Standard")
    assert api.writes == []
    assert not any("/secrets" in path for path in api.reads), "no right to read secrets is asked for"
    assert main(["diagnose", "chat"]) == 0
    assert "team-a/chat: ready, Standard mode, 2 of 2 pods ready" in capsys.readouterr().out


def test_nothing_there_yet_names_the_nearest_service(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.put("InferenceService", {"metadata": {"name": "chatt"}, "spec": {}})
    code, body = diagnose(capsys, "chat")
    assert code == 1
    assert body["findings"][0]["cause"] == "service-absent"
    assert "Did you mean chatt?" in body["findings"][0]["why"]


def test_a_manifest_is_tried_and_not_kept(api: FakeApi, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    manifest = tmp_path / "chat.yaml"
    manifest.write_text(yaml.safe_dump({"kind": "InferenceService", "metadata": {"name": "chat"}, "spec": {}}))
    api.refusal = (403, 'admission webhook "x" denied the request: [kpa] is not a supported autoscaler class type')
    code, body = diagnose(capsys, "chat", "--file", str(manifest))
    assert (code, body["findings"][0]["cause"]) == (1, "autoscaler-class")
    api.refusal = None
    code, body = diagnose(capsys, "chat", "--file", str(manifest))
    assert [f["cause"] for f in body["findings"]] == ["service-absent"]
    assert api.writes == []


def test_missing_rights_are_said_and_the_rest_is_judged(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.serve(snapshot(case_of("gpu-short")))
    api.forbidden |= {"/api/v1|nodes", "/apis/policy/v1|poddisruptionbudgets"}
    code, body = diagnose(capsys, "chat")
    assert (code, body["findings"][0]["cause"]) == (1, "gpu-short")
    main(["diagnose", "chat"])
    assert "Not read, for want of rights: Node, PodDisruptionBudget." in capsys.readouterr().out


def test_no_right_at_all_gives_three(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.forbidden.add("/apis/serving.kserve.io/v1beta1|inferenceservices")
    code, body = diagnose(capsys, "chat")
    assert (code, body["findings"][0]["cause"]) == (3, "rights-missing")


def test_a_cluster_without_kserve_is_told_from_a_missing_service(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.missing.add("/apis/serving.kserve.io/v1beta1|inferenceservices")
    assert diagnose(capsys, "chat")[1]["findings"][0]["cause"] == "kserve-not-installed"


def test_a_cluster_that_is_away_gives_three(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.stop()
    code, body = diagnose(capsys, "chat")
    assert (code, body["findings"][0]["cause"]) == (3, "cluster-unreachable")


def test_a_wrong_token_gives_three(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.kubeconfig.write_text(api.kubeconfig.read_text().replace("the-token-of-the-test", "another"))
    code, body = diagnose(capsys, "chat")
    assert (code, body["findings"][0]["cause"]) == (3, "signed-out")


def test_no_kubeconfig_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert main(["diagnose", "chat"]) == 2
    assert "no cluster is configured" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["diagnose", "a"], ["top", "a", "--once"], ["restart", "a"]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "can't decode"),
        (b"[1,\n2", "expected ',' or ']'"),
        (b"- a\n", "is no kubeconfig"),
        (None, "Is a directory"),
        # A cloud's plug-in raises errors of its own.
        ({"name": "u", "user": {"auth-provider": {"name": "gcp", "config": {}}}}, "credentials"),
        ({"name": "u", "user": {"tokenFile": "/nonexistent"}}, "No such file"),
    ],
    ids=["not text", "cut off", "a list", "a folder", "a plug-in without credentials", "no token"],
)
def test_a_kubeconfig_that_is_none_is_a_sentence(
    command: list[str], content: Any, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "config"
    if isinstance(content, dict):
        context = {"name": "k", "context": {"cluster": "c", "user": "u"}}
        cluster = {"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}
        tree = {"clusters": [cluster], "users": [content], "contexts": [context], "current-context": "k"}
        content = json.dumps(tree).encode()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    assert main([*command, "--kubeconfig", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("kserve-vllm: the kubeconfig can't be used: ")
    assert len(said.splitlines()) == 1
    assert words in said


def test_without_the_client_a_sentence_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['kubernetes'] = None\n"
        "from kserve_vllm.cli import main; sys.exit(main(['diagnose', 'chat']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "pip install 'kserve-vllm[ops]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_saved_snapshot_has_no_secrets_and_gives_the_same(
    api: FakeApi, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    taken = snapshot(case_of("token-missing"))
    pod = taken.objects["Pod"][0]
    pod["spec"]["containers"][0]["env"] = [
        {"name": "HF_TOKEN", "value": "hunter2-hunter2"},
        {"name": "HOME", "value": "/tmp"},
        {"name": "REDIS", "value": "redis://user:hunter3@redis:6379"},
    ]
    pod["spec"]["containers"][0]["args"] += ["--api-key=hunter4", "--api-key", "hunter5", "--model-name", "chat"]
    pod["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": "hunter6"}
    key = next(iter(k for k in taken.logs if k.endswith("previous")))
    taken.logs[key] += "\nBearer hunter7 hf_abcdefghijklmnopqrstuvwx"
    api.serve(taken)
    file = tmp_path / "chat.json"
    before = diagnose(capsys, "chat", "--save", str(file))[1]
    text = file.read_text()
    assert "hunter" not in text
    assert "hf_abcdef" not in text
    assert '"/tmp"' in text
    after = diagnose(capsys, "--from", str(file))[1]
    assert after["findings"] == before["findings"]
    assert judge(snapshots.read(file))[0].cause.id == "token-missing"


def test_names_of_other_services_pods_are_not_taken_for_its_own(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.serve(snapshot(case_of(None)))
    sick = json.loads(json.dumps(snapshot(case_of("gpu-short")).objects["Pod"][0]).replace("chat-", "chat2-"))
    sick["metadata"]["labels"]["serving.kserve.io/inferenceservice"] = "chat2"
    sick["metadata"]["labels"]["app"] = "isvc.chat2-predictor"
    api.put("Pod", sick)
    assert diagnose(capsys, "chat")[1]["findings"] == []


@pytest.mark.parametrize("arguments", [[], ["chat", "--url", "http://x"], ["--from", "/nowhere.json"]])
def test_arguments_that_do_not_fit_give_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", *arguments]) == 2
    assert "kserve-vllm: " in capsys.readouterr().err


class _Page(BaseHTTPRequestHandler):
    """A server as it would answer: healthy or not by its port's owner."""

    answers: dict[str, tuple[int, str]] = {}

    def do_GET(self) -> None:
        status, text = self.answers.get(self.path, (404, "<html>"))
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


def test_a_url_is_judged_without_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Page)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{http.server_address[1]}"
    ready = json.dumps({"ready": True, "live": True, "state": "ready", "seconds": 9.0})
    try:
        _Page.answers = {"/v2/health/ready": (200, ready), "/metrics": (200, "vllm:kv_cache_usage_perc 0.1\n")}
        assert diagnose(capsys, "--url", url)[0] == 0
        _Page.answers["/metrics"] = (200, "vllm:kv_cache_usage_perc 0.999\n")
        assert diagnose(capsys, "--url", url)[1]["findings"][0]["cause"] == "kv-full"
        _Page.answers = {}
        assert diagnose(capsys, "--url", url)[1]["findings"][0]["cause"] == "server-another"
    finally:
        http.shutdown()
        http.server_close()
    code, body = diagnose(capsys, "--url", url)
    assert (code, body["findings"][0]["cause"]) == (1, "server-unreachable")
    assert diagnose(capsys, "--url", "localhost:8080")[1]["findings"][0]["cause"] == "server-not-http"


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "--causes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("gpu-short ") for line in lines)


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["diagnose", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for words in ("Examples:", "Exit codes:", "--url http://localhost:8080", "writes nothing"):
        assert words in text


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m kserve_vllm diagnose --causes | head -1"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    # The table may fit into the pipe, in which case all was written.
    assert done.returncode in (0, 141)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("[]", "it is no object"),
        ('{"objects": {}}', "no 'name' in it"),
        (
            '{"name": "a", "namespace": "b", "taken_at": "2026-01-31T00:00:00Z", "objects": 5}',
            "'objects' has another kind",
        ),
        ('{"name": "a", "namespace": "b", "taken_at": "2026-01-31T00:00:00Z", "colour": {}}', "'colour' is no field"),
    ],
)
def test_a_file_that_is_no_snapshot_says_why(
    body: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.json").write_text(body)
    assert main(["diagnose", "--from", str(tmp_path / "s.json")]) == 2
    assert words in capsys.readouterr().err
