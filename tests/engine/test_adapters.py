"""Adapters that come, change and go under the real engine, and prompts that are warmed up before ready."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from openai import OpenAI
from safetensors.numpy import save_file

from tests.clients import assert_unharmed, outputs, post, texts
from tests.support import ROOT, Server, wait_until
from tests.triton import service_pb2, service_pb2_grpc

DEMO = ROOT / "runtime" / "kserve_vllm" / "demo" / "adapters"
WORD = "Repeat the word apple."
CAPITALS, FRENCH = "APPLE", "Le mot est apple"
WITHIN_S = 60.0
SYSTEM = "You are a careful helper of the harbour office. " * 6
OTHER_SYSTEM = "You count the boats that come in and go out at night. " * 6
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class ConfigMap:
    """A folder that is changed as the kubelet changes a mounted ConfigMap: a symlink is swapped."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name, self._count = folder, name, 0
        folder.mkdir()
        self.path = folder / name

    def write(self, text: str) -> None:
        """Replace the file's content."""
        self._count += 1
        data = self._folder / f"..{self._count}"
        data.mkdir()
        (data / self._name).write_text(text)
        (self._folder / "..new").symlink_to(data.name)
        (self._folder / "..new").rename(self._folder / "..data")
        if not self.path.is_symlink():
            self.path.symlink_to(f"..data/{self._name}")


class Site:
    """A server with its list of adapters and its warm-up prompts.

    Args:
        folder: for all of its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, dict[str, str]] = {}
        self.list = ConfigMap(folder / "adapters", "adapters.yaml")
        self.prompts = ConfigMap(folder / "prompts", "prompts.yaml")
        self.prompts.write(json.dumps([SYSTEM]))
        self.declare(loud=str(self.adapter("loud", "upper")))
        hub = folder / "hub" / "models--org--accent"
        (hub / "refs").mkdir(parents=True)
        (hub / "refs" / "main").write_text(COMMIT)
        shutil.copytree(DEMO / "french", hub / "snapshots" / COMMIT)
        self.server = Server(
            [
                # The texts of streams are compared that share their batches with others or not: in bfloat16 two
                # tokens may tie, and the size of a batch decides.
                *("--demo", "--dtype", "float32", "--max-model-len", "2048"),
                *("--allow-model-control", "--enable-prompt-tokens-details"),
                *("--block-size", "32", "--adapters-file", str(self.list.path)),
                *("--warmup-file", str(self.prompts.path)),
            ],
            {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"},
        )

    def adapter(self, name: str, like: str) -> Path:
        """A new folder with a copy of a demo adapter."""
        target = self.folder / "files" / name
        shutil.copytree(DEMO / like, target)
        return target

    def declare(self, **sources: str | None) -> None:
        """Write the list with these adapters added, or removed where None is given."""
        for name, source in sources.items():
            if source is None:
                self.rows.pop(name, None)
            else:
                self.rows[name] = {"name": name, "source": source}
        self.list.write(json.dumps({"adapters": list(self.rows.values())}))

    def status(self, name: str) -> dict[str, Any]:
        """The adapter's row, empty where there is none."""
        rows = httpx.get(f"{self.server.url}/v1/adapters", timeout=10).json()["data"]
        found: dict[str, Any] = next((row for row in rows if row["name"] == name), {})
        return found

    def stats(self, name: str) -> dict[str, Any]:
        """The adapter's counts."""
        rows = httpx.get(f"{self.server.url}/v1/adapters/stats", timeout=10).json()["data"]
        found: dict[str, Any] = next(row for row in rows if row["name"] == name)
        return found

    def until(self, name: str, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the adapter's row is as wanted."""
        wait_until(lambda: done(self.status(name)), WITHIN_S, lambda: f"{name}: {self.status(name)}")
        return self.status(name)

    def add(self, name: str, like: str) -> Path:
        """Declare a copy of a demo adapter and wait until it is loaded."""
        folder = self.adapter(name, like)
        self.declare(**{name: str(folder)})
        self.until(name, lambda row: row.get("state") == "loaded")
        return folder

    def chat(self, model: str, prompt: str = WORD, **options: Any) -> httpx.Response:
        """Ask, greedily."""
        messages = options.pop("messages", [{"role": "user", "content": prompt}])
        body = {"model": model, "messages": messages, "temperature": 0.0, "max_tokens": 24, **options}
        return post(self.server, "/v1/chat/completions", body)

    def answer(self, model: str, prompt: str = WORD, **options: Any) -> str:
        """The text of an answer, which must be one."""
        response = self.chat(model, prompt, **options)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    def cached(self, system: str, user: str) -> int:
        """Tokens of a chat's prompt that were found in the prefix cache."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = self.chat("demo", messages=messages).json()
        return int((body["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The demo model with a declared adapter `loud`, beside `upper` and `french` of --lora-modules."""
    running = Site(tmp_path_factory.mktemp("site"))
    try:
        running.server.wait_ready()
        yield running
    finally:
        running.server.stop()


def turn_french(folder: Path) -> None:
    """Replace an adapter's weights, as an atomic rename does."""
    shutil.copy(DEMO / "french" / "adapter_model.safetensors", folder / "new")
    os.replace(folder / "new", folder / "adapter_model.safetensors")


class Stream(threading.Thread):
    """A long streamed chat in a thread."""

    def __init__(self, site: Site, model: str, tokens: int) -> None:
        super().__init__()
        self._site, self._model, self._tokens = site, model, tokens
        self.began, self.text, self.reason, self.status = threading.Event(), "", "", 0
        self.start()

    def run(self) -> None:
        """Ask and read to the end."""
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": WORD}],
            **{"temperature": 0.0, "max_tokens": self._tokens, "ignore_eos": True, "stream": True},
        }
        url = self._site.server.url + "/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=300) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self.reason = str(event)
                    return
                choice = event["choices"][0]
                self.text += choice["delta"].get("content") or ""
                self.reason = choice.get("finish_reason") or self.reason
                if self.text:
                    self.began.set()


def test_what_is_declared_is_loaded_before_ready_and_listed_under_its_plain_name(site: Site) -> None:
    assert site.answer("loud") == CAPITALS
    assert site.answer("demo") not in (CAPITALS, FRENCH)
    row = site.status("loud")
    assert (row["state"], row["origin"], row["error"]) == ("loaded", "file", None)
    assert len(row["digest"]) == 64
    # --lora-modules are in the same list.
    assert site.status("upper")["origin"] == site.status("french")["origin"] == "flag"
    with OpenAI(base_url=f"{site.server.url}/v1", api_key="-") as client:
        listed = [model.id for model in client.models.list()]
    assert {"demo", "upper", "french", "loud"} <= set(listed)
    assert len(listed) == len(set(listed))
    assert not [name for name in listed if "@" in name or ":" in name]
    wait_until(
        lambda: site.server.metric("kserve_vllm_requests_total", model="loud", outcome="ok") > 0, 5, "not counted"
    )
    text = httpx.get(f"{site.server.url}/metrics").text
    assert "loud@" not in text


def test_prompts_are_in_the_prefix_cache_before_ready_and_again_when_the_file_changes(site: Site) -> None:
    assert site.server.metric("kserve_vllm_warmup_prompts_total", outcome="ok") >= 1
    assert site.cached(SYSTEM, "How many boats are there?") > 64
    assert site.cached(OTHER_SYSTEM, "How many boats are there?") < 32
    third = "Night and day the tower watches over ships and tells them where the rocks are. " * 6
    done = site.server.metric("kserve_vllm_warmup_prompts_total", outcome="ok")
    site.prompts.write(json.dumps([{"system": third}, {"model": "loud", "system": third}]))
    wait_until(
        lambda: site.server.metric("kserve_vllm_warmup_prompts_total", outcome="ok") == done + 2, 30, "no warm-up"
    )
    assert site.cached(third, "Hello!") > 64
    site.prompts.write("{broken: ")
    wait_until(lambda: "the warm-up list stays as it is" in site.server.log, 30, "not said")
    assert_unharmed(site.server)


def test_a_change_takes_effect_at_once_and_streams_in_flight_finish_with_the_old_weights(site: Site) -> None:
    folder = site.add("turn", "upper")
    before = site.status("turn")["digest"]
    assert site.answer("turn") == CAPITALS
    alone = Stream(site, "turn", 1500)
    alone.join()
    streams = [Stream(site, "turn", 1500) for _ in range(3)]
    for stream in streams:
        assert stream.began.wait(60)
    turn_french(folder)
    loaded = post(site.server, "/v1/adapters/turn/load", {})
    assert (loaded.status_code, loaded.json()["state"]) == (200, "loaded"), loaded.text
    assert loaded.json()["digest"] != before
    assert all(stream.is_alive() for stream in streams), "the streams were too short to show anything"
    # The same prompt, of which the prefix cache has every block under the adapter's old weights.
    assert site.answer("turn") == FRENCH
    assert any(stream.is_alive() for stream in streams), "the streams were too short to show anything"
    for stream in streams:
        stream.join(120)
        assert (stream.status, stream.reason) == (200, "length")
        assert stream.text.startswith(CAPITALS)
        assert stream.text == alone.text
    assert site.stats("turn")["reloads"] == 1


def test_the_prefix_cache_never_mixes_two_contents_of_one_name(site: Site) -> None:
    folder = site.add("mixed", "upper")
    prompt = "Repeat the word pear. " * 20 + WORD

    def cached() -> int:
        body = site.chat("mixed", prompt).json()
        return int((body["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0))

    first = site.answer("mixed", prompt)
    assert cached() > 64
    turn_french(folder)
    assert post(site.server, "/v1/adapters/mixed/load", {}).status_code == 200
    body = site.chat("mixed", prompt).json()
    assert not (body["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)
    assert body["choices"][0]["message"]["content"] == site.answer("french", prompt) != first


def test_a_changed_folder_is_seen_by_itself_and_no_request_fails_meanwhile(site: Site) -> None:
    folder = site.add("alone", "upper")
    over = threading.Event()
    answers: list[tuple[int, str]] = []

    def ask() -> None:
        while not over.is_set():
            response = site.chat("alone")
            text = response.json()["choices"][0]["message"]["content"] if response.status_code == 200 else ""
            answers.append((response.status_code, text))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        before = site.status("alone")["digest"]
        wait_until(lambda: bool(answers), WITHIN_S, "nothing was answered before the change")
        turn_french(folder)
        site.until("alone", lambda row: row["digest"] != before)
        # What was in flight at the change ends with the old weights; the next ones have the new ones.
        count = len(answers)
        wait_until(lambda: len(answers) > count + 2 * len(threads), WITHIN_S, "no more answers after the change")
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert set(answers) == {(200, CAPITALS), (200, FRENCH)}
    assert site.answer("alone") == FRENCH


def test_removed_means_not_found_and_what_is_in_flight_ends(site: Site) -> None:
    site.add("gone", "upper")
    stream = Stream(site, "gone", 300)
    assert stream.began.wait(60)
    site.declare(gone=None)
    wait_until(lambda: site.chat("gone").status_code == 404, WITHIN_S, "still served")
    stream.join(120)
    assert (stream.status, stream.reason) == (200, "length")
    assert site.status("gone") == {}
    assert post(site.server, "/v2/models/gone/infer", texts("x")).status_code == 404
    assert "gone" not in {model["id"] for model in httpx.get(f"{site.server.url}/v1/models").json()["data"]}


def damage(folder: Path) -> None:
    """Cut the weights off."""
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def lose(folder: Path) -> None:
    """Delete the weights."""
    (folder / "adapter_model.safetensors").unlink()


def raise_rank(folder: Path) -> None:
    """Say a rank above the server's."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 12}))


def write_weights(folder: Path, module: str, *shapes: tuple[int, int]) -> None:
    """One module's weights of zeros, A and B, in the place of all there are."""
    name = f"base_model.model.model.layers.0.self_attn.{module}"
    weights = {
        f"{name}.lora_{part}.weight": np.zeros(shape, np.float32) for part, shape in zip("AB", shapes, strict=True)
    }
    save_file(weights, folder / "adapter_model.safetensors")


def shrink(folder: Path) -> None:
    """Weights for a narrower base model, which vLLM itself would take without a word."""
    write_weights(folder, "q_proj", (8, 64), (64, 8))


def misname(folder: Path) -> None:
    """Weights for a module that no model has: our own check knows nothing of it, the engine does."""
    write_weights(folder, "nothing", (8, 128), (8, 8))


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (damage, "adapter_model.safetensors is damaged"),
        (lose, "has no adapter_model.safetensors"),
        (raise_rank, "its rank is 12 and --max-lora-rank is 8; set --max-lora-rank 16"),
        (shrink, "q_proj is 64 x 64 in the adapter and 128 x 128 in the base model"),
        (misname, "the engine can't load it"),
        (shutil.rmtree, "is no folder"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_adapter_is_reported_and_harms_nobody(site: Site, harm: Callable[[Path], None], sentence: str) -> None:
    name = f"broken-{harm.__name__}"
    folder = site.adapter(name, "upper")
    harm(folder)
    site.declare(**{name: str(folder)})
    row = site.until(name, lambda row: row.get("state") == "failed")
    assert sentence in row["error"]
    assert site.chat(name).status_code == 404
    assert site.server.metric("kserve_vllm_adapter_failures_total", adapter=name) == 1
    assert site.server.metric("kserve_vllm_adapters", state="failed") >= 1
    index = post(site.server, "/v2/repository/index", {}).json()
    assert next(each for each in index if each["name"] == name)["reason"] == row["error"]
    refused = post(site.server, f"/v1/adapters/{name}/load", {})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "name")
    assert site.answer("loud") == CAPITALS
    assert_unharmed(site.server)
    shutil.rmtree(folder, ignore_errors=True)
    site.adapter(name, "french")
    if harm is not damage:
        assert post(site.server, f"/v1/adapters/{name}/load", {}).status_code == 200
    # Mended, it is loaded without being asked to, too.
    site.until(name, lambda row: row["state"] == "loaded" and row["error"] is None)
    assert site.answer(name) == FRENCH
    site.declare(**{name: None})


def test_a_broken_change_leaves_the_version_before_in_service(site: Site) -> None:
    folder = site.add("kept", "upper")
    damage(folder)
    row = site.until("kept", lambda row: row["error"] is not None)
    assert row["state"] == "loaded"
    assert "is damaged" in row["error"]
    assert site.answer("kept") == CAPITALS
    site.declare(kept=None)


def test_a_broken_list_leaves_the_adapters_as_they_are(site: Site) -> None:
    site.list.write("adapters: [{name: loud}]")
    wait_until(lambda: "entry 1 (loud): source ''" in site.server.log, 30, "not said")
    assert site.answer("loud") == CAPITALS
    site.declare()


def test_an_adapter_outlives_the_engines_cache_and_its_own_folder(site: Site) -> None:
    """vLLM reads an adapter's files again when more adapters are in use than it keeps, and would die without them."""
    folder = site.add("sunk", "french")
    assert site.answer("sunk") == FRENCH
    shutil.rmtree(folder)
    for name in ("loud", "upper", "french", "loud"):
        site.answer(name, "Hello!")
    assert site.answer("sunk") == FRENCH
    assert_unharmed(site.server)
    site.declare(sunk=None)


def test_an_adapter_comes_from_the_hub_with_its_commit(site: Site) -> None:
    site.declare(accent="hf://org/accent@main")
    row = site.until("accent", lambda row: row.get("state") == "loaded")
    assert row["revision"] == COMMIT
    assert site.answer("accent") == FRENCH
    site.declare(nowhere="hf://org/nowhere")
    site.until("nowhere", lambda row: row.get("state") == "failed")
    wait_until(lambda: site.stats("nowhere")["failures"] >= 2, 30, "not tried again")
    assert post(site.server, "/v1/adapters/nowhere/load", {}).status_code == 503
    site.declare(accent=None, nowhere=None)


def test_base_and_adapter_together_name_the_adapter_in_every_protocol(site: Site) -> None:
    name = "demo:loud"
    body = site.chat(name).json()
    assert (body["model"], body["choices"][0]["message"]["content"]) == (name, CAPITALS)
    assert site.chat("loud").json()["model"] == "loud"
    assert site.chat("demo:nothing").status_code == 404
    prompt = "17 + 25 ="
    options = {"max_tokens": 8, "temperature": 0.0}
    plain = outputs(post(site.server, "/v2/models/loud/infer", texts(prompt, **options)).json())["text_output"]
    answer = post(site.server, f"/v2/models/{name}/infer", texts(prompt, **options)).json()
    assert (answer["model_name"], outputs(answer)["text_output"]) == (name, plain)
    predicted = post(site.server, f"/v1/models/{name}:predict", {"instances": [prompt], "parameters": options})
    assert predicted.status_code == 200, predicted.text
    assert plain[0] in json.dumps(predicted.json())
    assert httpx.get(f"{site.server.url}/v2/models/{name}/ready").status_code == 200
    with grpc.insecure_channel(site.server.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name=name)
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(prompt.encode())
        request.parameters["max_tokens"].int64_param = 8
        request.parameters["temperature"].double_param = 0.0
        reply = stub.ModelInfer(request)
        text = next(each for each in reply.outputs if each.name == "text_output")
        assert plain[0].encode() in (text.contents.bytes_contents[:] or [reply.raw_output_contents[0]])[0]
        assert stub.ModelReady(service_pb2.ModelReadyRequest(name=name)).ready


def test_unload_holds_until_load_through_either_api(site: Site) -> None:
    folder = site.add("lamp", "upper")
    url = f"{site.server.url}/v1/adapters/lamp"
    assert httpx.delete(url, timeout=30).json()["state"] == "unloaded"
    assert site.chat("lamp").status_code == 404
    assert httpx.get(f"{site.server.url}/v2/models/lamp/ready").status_code == 503
    turn_french(folder)
    index = post(site.server, "/v2/repository/index", {}).json()
    assert next(row for row in index if row["name"] == "lamp")["state"] == "UNAVAILABLE"
    assert post(site.server, "/v2/repository/models/lamp/load", {}).status_code == 200
    assert site.answer("lamp") == FRENCH
    assert post(site.server, "/v2/repository/models/lamp/unload", {}).status_code == 200
    assert httpx.get(url).json()["state"] == "unloaded"
    assert post(site.server, "/v1/adapters/demo:lamp/load", {}).json()["state"] == "loaded"
    # Those of --lora-modules go the same way.
    assert httpx.delete(f"{site.server.url}/v1/adapters/upper", timeout=30).json()["state"] == "unloaded"
    assert site.chat("upper").status_code == 404
    assert post(site.server, "/v1/adapters/upper/load", {}).json()["state"] == "loaded"
    assert site.answer("upper") == CAPITALS
    site.declare(lamp=None)


def test_only_what_is_declared_can_be_loaded(site: Site) -> None:
    folder = site.adapter("secret", "upper")
    for name in (str(folder), f"..{folder}", "%2e%2e%2fsecret", "demo", "hf:%2F%2Forg%2Faccent"):
        response = post(site.server, f"/v1/adapters/{name}/load", {"source": str(folder)})
        assert response.status_code == 404, (name, response.text)
        error = response.json()["error"]
        assert error["type"] == "NotFoundError"
    assert site.status("secret") == {}


def test_what_an_adapter_did_is_counted_under_its_name(site: Site) -> None:
    before = site.stats("loud")
    response = site.chat("demo:loud", n=2, temperature=1.0).json()
    wait_until(lambda: site.stats("loud")["in_flight"] == 0, 10, "in flight")
    after = site.stats("loud")
    assert after["requests"] == before["requests"] + 1
    assert after["prompt_tokens"] == before["prompt_tokens"] + response["usage"]["prompt_tokens"]
    assert after["output_tokens"] == before["output_tokens"] + response["usage"]["completion_tokens"]


def test_the_api_is_in_the_document(site: Site) -> None:
    paths = httpx.get(f"{site.server.url}/openapi.json", timeout=60).json()["paths"]
    assert set(paths["/v1/adapters/{name}"]) == {"get", "delete"}
    assert {"/v1/adapters", "/v1/adapters/stats", "/v1/adapters/{name}/load"} <= set(paths)


def test_old_versions_leave_no_files_behind(site: Site) -> None:
    """Runs last: by then the tests above have replaced and removed many."""
    caches = list(Path(os.environ.get("TMPDIR", "/tmp")).glob("kserve-vllm-adapters-*"))
    pid = site.server.process.pid
    own = [cache for cache in caches if cache.stat().st_mtime > os.stat(f"/proc/{pid}").st_mtime]
    held = {row["digest"][:16] for row in httpx.get(f"{site.server.url}/v1/adapters").json()["data"] if row["digest"]}

    def left() -> set[str]:
        return {version.name[:16] for cache in own for version in cache.glob("*/*")}

    assert held <= left()
    wait_until(lambda: left() <= held, 40, lambda: f"{left() - held} are left")
