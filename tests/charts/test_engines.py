"""Other engines: one line moves a service, what they cannot do is refused, and their own parsers know every flag.

engine_flags.json holds the names that the engines' parsers take (tests/tools/read_engine_flags.py reads them). That
llama.cpp serves a model with what is rendered here is shown by tests/engines/run_llama_cpp.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.charts import kserve_merge
from tests.charts.support import CHART, Document, load, of_kind, refused, render

ENGINES = {path.stem: load(path) for path in sorted((CHART / "files" / "engines").glob("*.yaml"))}
KNOWN: dict[str, set[str]] = {
    name: set(names) for name, names in json.loads((Path(__file__).parent / "engine_flags.json").read_text()).items()
}
SCRIPTS = CHART / "files" / "scripts"
# Values of an InferenceService that KServe or Kubernetes carries out, whatever the engine. The others are the engine's.
EVERYWHERE = set(
    "enabled deploymentMode runtime engine device labels annotations podLabels podAnnotations storageUri storage "
    "storageContainerName model extraArgs env envFrom extraVolumes extraVolumeMounts initContainers gpu resources "
    "resourceClaims tmpSizeLimit sharedMemory nodeSelector tolerations affinity topologySpreadConstraints "
    "priorityClassName runtimeClassName schedulerName serviceAccountName huggingFaceToken timeoutSeconds "
    "terminationGracePeriodSeconds rollout drain autoscaling startupSeconds progressDeadlineSeconds tagRouting canary "
    "podDisruptionBudget networkPolicy".split()
)
engine = pytest.mark.parametrize("name", ENGINES)


def everything(name: str) -> Document:
    """A service with all that an engine can do."""
    facts = ENGINES[name]
    able = {**facts.get("flags", {}), **facts.get("variables", {}), **facts.get("splits", {})}
    values: Document = {
        "engine": name,
        "device": "gpu",
        "deploymentMode": "Standard",
        "storageUri": "s3://a/b",
        "extraArgs": ["--x=1"],
        "resources": {"limits": {"cpu": "1500m"}},
    }
    settings = {"maxNumSeqs": 7, "maxModelLen": 100, "quantization": "awq"}
    values |= {
        key: value for key, value in settings.items() if key in able or (key == "maxModelLen" and "context" in facts)
    }
    axes = [path.split(".")[1] for path in able if path.startswith("parallelism.")]
    values["parallelism"] = {axis: 2 for axis in axes}
    if "tracing.endpoint" in able:
        values["tracing"] = {"endpoint": "http://c:4317"}
    if "chatTemplate.configMap" in able:
        values["chatTemplate"] = {"configMap": "c"}
    if "adapters" in facts:
        values["lora"] = {"adapters": [{"name": "a", "path": "/a"}, {"name": "b", "storageUri": "s3://a/c"}]}
    if "embed" in facts:
        values["task"] = "embed"
    if name == "ollama":
        del values["extraArgs"]
    return values


@pytest.fixture(scope="module")
def rendered() -> list[Document]:
    """Every engine with all that it can do, in one render."""
    return render({"inferenceServices": {name: everything(name) for name in ENGINES}})


def container_of(documents: list[Document], name: str) -> Document:
    """The serving container that KServe makes."""
    service = of_kind(documents, "InferenceService")[name]
    runtimes = of_kind(documents, "ClusterServingRuntime")
    found: Document = kserve_merge.pod(service, runtimes[service["spec"]["predictor"]["model"]["runtime"]])
    serving: Document = found["spec"]["containers"][0]
    return serving


def flag(word: str) -> str:
    return word.split("=", 1)[0]


@engine
def test_the_engines_parser_knows_every_flag_and_variable(name: str, rendered: list[Document]) -> None:
    facts, known = ENGINES[name], KNOWN[name]
    container = container_of(rendered, name)
    own = {"--model-path"} if name == "lmdeploy" else {"--name", "--model"} if name == "ollama" else set()
    given = {flag(word) for word in container["args"] if word.startswith("-")} - {"--x"}
    assert given <= known | own, given - known - own
    variables = {entry["name"] for entry in container["env"]}
    assert {v for v in variables if v.startswith("OLLAMA_")} <= known
    assert set(facts.get("variables", {}).values()) <= known
    # What is refused in extraArgs exists too: argparse takes the beginning of a flag for the whole of it.
    for word in facts["owned"]:
        assert word in own or any(each.startswith(word) for each in known), word
    assert set(facts.get("ownedEnv", {})) <= known
    metrics = {value for value in facts.get("metrics", {}).values() if isinstance(value, str)}
    assert metrics <= known, metrics - known


@engine
def test_what_a_service_asks_for_reaches_the_engine(name: str, rendered: list[Document]) -> None:
    facts, values, container = ENGINES[name], everything(name), container_of(rendered, name)
    words = container["args"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    for path in ("maxNumSeqs", "maxModelLen", "quantization"):
        if path in values:
            text = str(values[path])
            spoken = f"{facts['flags'][path]}={text}" if path in facts["flags"] else None
            variable = facts.get("variables", {}).get(path)
            assert spoken in words or env.get(variable or "") == text or (path == "maxModelLen" and "context" in facts)
    if "context" in facts:
        # Shared out to seven sequences, each of which may have a hundred tokens.
        assert f"{facts['context']}=700" in words
        assert f"{facts['threads']}=2" in words
    if "flag" in facts.get("adapters", {}):
        at = words.index(facts["adapters"]["flag"])
        assert words[at + 1 : at + 3] == ["a=/a", "b=/mnt/models/adapters/b"]
        assert f"{facts['flags']['model']}=/mnt/models/base" in words
    assert words[-1] == "--x=1" or name == "ollama"
    assert container["lifecycle"] == {"preStop": {"sleep": {"seconds": 10}}}
    assert "{{" not in json.dumps(container)


@engine
def test_a_runtime_has_probes_of_its_engine_and_no_format_of_another(name: str, rendered: list[Document]) -> None:
    runtime = of_kind(rendered, "ClusterServingRuntime")[f"kserve-{name}-gpu"]
    (container,) = runtime["spec"]["containers"]
    assert container["image"] == ENGINES[name]["images"]["gpu"]
    assert re.search(r":v?[b0-9a-z.-]*[0-9]", container["image"])
    assert container["startupProbe"]["httpGet"]["path"] == ENGINES[name]["ready"]
    assert container["livenessProbe"]["httpGet"]["path"] == ENGINES[name]["live"]
    formats = [form["name"] for form in runtime["spec"]["supportedModelFormats"]]
    assert formats == [f"kserve-{name}", "huggingface"]
    assert not any(form["autoSelect"] for form in runtime["spec"]["supportedModelFormats"])
    scraped = "kserve-vllm/runtimes-of" in runtime["spec"]["labels"]
    assert scraped == ("prometheus.kserve.io/port" in runtime["spec"]["annotations"]) == ("metrics" in ENGINES[name])


def test_one_line_moves_a_service() -> None:
    common: Document = {
        "deploymentMode": "Standard",
        "storageUri": "hf://org/model",
        "maxModelLen": 4096,
        "maxNumSeqs": 8,
        "autoscaling": {"class": "keda", "maxReplicas": 5},
        "gpu": {"products": ["NVIDIA-L4"]},
        "resources": {"requests": {"memory": "9Gi"}},
        "nodeSelector": {"pool": "a"},
    }
    movable = ["kserve-vllm", "sglang", "tgi", "lmdeploy", "llama-cpp"]
    documents = render({"inferenceServices": {f"on-{name}": {**common, "engine": name} for name in movable}})
    services = of_kind(documents, "InferenceService")
    same = []
    for name in movable:
        predictor = services[f"on-{name}"]["spec"]["predictor"]
        query = predictor["autoScaling"]["metrics"][0]["external"]["metric"].pop("query")
        queue = ENGINES[name]["metrics"]["queue"] if name in ENGINES else "vllm:num_requests_waiting"
        assert queue in query
        kept = {key: value for key, value in predictor.items() if key != "model"}
        same.append({**kept, "uri": predictor["model"]["storageUri"], "resources": predictor["model"]["resources"]})
    assert all(each == same[0] for each in same)


def test_the_runtime_of_an_engine_is_there_when_it_is_used_or_asked_for() -> None:
    def names(values: Document) -> set[str]:
        return {n for n in of_kind(render(values), "ClusterServingRuntime") if not n.startswith("kserve-vllm")}

    on_cpu: Document = {"inferenceServices": {"a": {"engine": "llama-cpp", "device": "cpu", "storageUri": "s3://a/b"}}}
    assert names({}) == set()
    assert names(on_cpu) == {"kserve-llama-cpp-cpu"}
    asked = {"runtimes": {"engines": {"llama-cpp": {"enabled": True, "name": "mine"}}}}
    assert names(asked) == {"mine-cpu", "mine-gpu"}
    # A release of services alone runs on another's.
    alone = {"runtimes": {"enabled": False}, **on_cpu}
    assert "name one of another release in `runtime`" in refused(alone)
    on_cpu["inferenceServices"]["a"]["runtime"] = "theirs-cpu"
    (service,) = of_kind(render(alone), "InferenceService").values()
    assert service["spec"]["predictor"]["model"]["runtime"] == "theirs-cpu"


def test_every_value_of_an_engines_runtime_does_something() -> None:
    changes: dict[str, Any] = {
        "name": "other",
        "registry": "mirror.example.com",
        "images": {"gpu": "r/a:1"},
        "requests": {"cpu": 9},
        "sharedMemory": "3Gi",
        "extraArgs": ["--x"],
        "env": [{"name": "A", "value": 1}],
        "securityContext": {"readOnlyRootFilesystem": False},
        "envFrom": [{"secretRef": {"name": "s"}}],
        "extraVolumes": [{"name": "x", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "tmp", "mountPath": "/x"}],
        "nodeSelector": {"a": 1},
        "tolerations": [{"key": "a", "operator": "Exists"}],
    }
    assert set(changes) | {"enabled"} == set(load(CHART / "values.yaml")["engineRuntimeDefaults"])
    names = list(ENGINES)
    plain = of_kind(render({"engineRuntimeDefaults": {"enabled": True}}), "ClusterServingRuntime")
    left = list(changes.items())
    while left:
        part, left = left[: len(names)], left[len(names) :]
        engines = {name: {"enabled": True, key: value} for name, (key, value) in zip(names, part, strict=False)}
        found = of_kind(render({"runtimes": {"engines": engines}}), "ClusterServingRuntime")
        for name, (key, _) in zip(names, part, strict=False):
            default = plain[f"kserve-{name}-gpu"]
            assert found.get(f"kserve-{name}-gpu") != default, key
            # And as a default of all engines it is the same.
        assert found != plain


def test_a_value_is_everywhere_or_each_engines_own() -> None:
    own = set(load(CHART / "files" / "needs.yaml")["engines"])
    values = set(load(CHART / "values.yaml")["inferenceServiceDefaults"])
    assert own | EVERYWHERE == values
    assert not own & EVERYWHERE


@engine
def test_what_an_engine_cannot_do_is_refused_with_what_to_do(name: str) -> None:
    facts = ENGINES[name]
    tried: Document = {
        "apiKeys": {"secretName": "s"},
        "redis": {"secretName": "s"},
        "warmup": {"configMap": "c"},
        "moderation": {"configMap": "c"},
        "apiServerCount": 2,
        "responseCache": "memory",
        "usageSink": "log",
        "profile": "low-latency",
        "servedNames": ["x"],
        "speculative": {"method": "ngram"},
        "task": "embed",
        "multiNode": {"enabled": True},
        "grpc": {"enabled": True},
        "maxNumSeqs": 3,
        "maxModelLen": 3,
        "quantization": "awq",
        "chatTemplate": {"configMap": "c"},
        "lora": {"adapters": [{"name": "a", "path": "/a"}]},
        "parallelism": {"data": 2, "tensor": 2, "pipeline": 2},
        "tracing": {"endpoint": "http://c:1"},
        "modelFormat": "kserve-vllm",
        "coldStart": {"cache": {"claim": "c"}},
    }
    said = refused(
        {
            "inferenceServices": {
                "chat": {"engine": name, "demo": True, "env": [{"name": "KSERVE_VLLM_SEED", "value": 1}], **tried}
            }
        }
    )
    able = {*facts.get("flags", {}), *facts.get("variables", {}), *facts.get("splits", {})}
    able |= {
        key
        for key, has in {"maxModelLen": "context", "lora": "adapters", "task": "embed", "grpc": "grpc"}.items()
        if has in facts
    }
    able |= {path.split(".")[0] for path in able if not path.startswith("parallelism")}
    for top in tried:
        refusal = f"{facts['title']} cannot do {top}"
        all_axes = {f"parallelism.{axis}" for axis in tried["parallelism"]} <= able
        assert (refusal in said) == (top not in able and not (top == "parallelism" and all_axes)), top
    assert "cannot do demo" in said
    assert f"KSERVE_VLLM_SEED in env is read by kserve-vllm alone, and {facts['title']} is another engine" in said


def test_settings_of_an_engine_that_nobody_uses_are_refused() -> None:
    values = {"runtimes": {"engines": {"tgi": {"sharedMemory": "2Gi"}}}}
    assert "runtimes.engines.tgi: what it says does nothing" in refused(values)


@pytest.mark.parametrize(
    ("files", "words", "said"),
    [
        (["a.gguf"], ["--port=1", "--x"], "--model /MODELS/a.gguf --port 1 --x"),
        (["b-00002-of-00002.gguf", "b-00001-of-00002.gguf"], [], "--model /MODELS/b-00001-of-00002.gguf"),
        (["a.gguf", "mmproj-a.gguf"], [], "--model /MODELS/a.gguf"),
        ([], ["--hf-repo=org/model:Q4"], "--hf-repo org/model:Q4"),
        ([], [], "no GGUF file"),
        (["a.gguf", "b.gguf"], [], "several GGUF models"),
    ],
)
def test_llama_cpp_starts_on_the_file_that_is_there(
    files: list[str], words: list[str], said: str, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).touch()
    script = (SCRIPTS / "llama_cpp_start.sh").read_text().replace("/mnt/models", str(tmp_path))
    done = subprocess.run(["/bin/sh", "-c", script, "echo", *words], capture_output=True, text=True, check=False)
    assert said.replace("/MODELS", str(tmp_path)) in (done.stdout or done.stderr)
    assert (done.returncode == 0) == said.startswith("--")


@pytest.mark.parametrize(("words", "model"), [([], "/mnt/models"), (["--model-path=org/m"], "org/m")])
def test_lmdeploy_gets_its_model_as_a_word(words: list[str], model: str) -> None:
    script = (SCRIPTS / "lmdeploy_start.sh").read_text()
    command = ["/bin/sh", "-c", script, "echo", "--tp=2", *words, "--adapters", "a=/a"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"serve api_server {model} --tp=2 --adapters a=/a"


@pytest.mark.parametrize("pulled", [False, True])
def test_ollama_has_the_model_under_the_services_name_before_it_is_ready(pulled: bool, tmp_path: Path) -> None:
    """The script against a stand-in for the program, which notes what it is asked."""
    program = tmp_path / "ollama"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nif [ "$1" = serve ]; then exec sleep 3; fi\n')
    program.chmod(0o755)
    (tmp_path / "m.gguf").touch()
    script = (SCRIPTS / "ollama_start.sh").read_text().replace("/mnt/models", str(tmp_path))
    words = ["--name=chat", *(["--model=qwen3:1b"] if pulled else [])]
    done = subprocess.run(
        ["/bin/sh", "-c", script.replace("/tmp/Modelfile", f"{tmp_path}/Modelfile"), str(program), *words], check=False
    )
    asked = (tmp_path / "asked").read_text().splitlines()
    model = "qwen3:1b" if pulled else "loading"
    made = [f"pull {model}"] if pulled else [f"create {model} -f {tmp_path}/Modelfile"]
    # It is started beside the questions, so it may note itself a little later than the first of them.
    assert asked.count("serve") == 1
    asked.remove("serve")
    assert asked == ["list", *made, f"run {model} ", f"cp {model} chat", "run chat "]
    assert done.returncode == 0
    if not pulled:
        assert (tmp_path / "Modelfile").read_text() == f"FROM {tmp_path}/m.gguf\n"


def test_the_build_of_an_engine_makes_a_repository_of_the_images_templates(tmp_path: Path) -> None:
    """The Job's script with templates of the same placeholders and a stand-in for TensorRT-LLM, which needs a GPU."""
    templates, models, modules = tmp_path / "templates", tmp_path / "models", tmp_path / "modules"
    for name in ("preprocessing", "postprocessing", "tensorrt_llm", "ensemble"):
        (templates / name).mkdir(parents=True)
        text = f'name: "{name}"\nmax_batch_size: ${{triton_max_batch_size}}\n'
        text += 'value: "${tokenizer_dir}" "${optional_one}"\n'
        (templates / name / "config.pbtxt").write_text(text)
    (templates / "tensorrt_llm" / "1").mkdir()
    (models / "model").mkdir(parents=True)
    (models / "model" / "tokenizer.json").write_text("{}")
    (models / "model" / "model.safetensors").write_text("x")
    (modules / "tensorrt_llm").mkdir(parents=True)
    (modules / "tensorrt_llm" / "__init__.py").write_text("BuildConfig = dict\n")
    (modules / "tensorrt_llm" / "_tensorrt_engine.py").write_text(
        "from pathlib import Path\nclass LLM:\n"
        "    def __init__(self, **given): self.given = given\n"
        "    def save(self, at): Path(at).mkdir(); Path(at, 'config.json').write_text(repr(self.given))\n"
        "    def shutdown(self): pass\n"
    )
    (job,) = of_kind(
        render(
            {
                "modelCaches": {
                    "m": {
                        "huggingFace": {"repository": "a/b"},
                        "tensorrtLLM": {"model": "chat", "tensor": 2, "maxBatchSize": 9},
                    }
                }
            }
        ),
        "Job",
    ).values()
    pod = job["spec"]["template"]["spec"]
    assert [each["name"] for each in pod["initContainers"]] == ["fill"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2", "memory": "64Gi"}
    assert container["image"] == ENGINES["triton"]["images"]["gpu"]
    environment = {"TEMPLATES": str(templates), "MODELS": str(models), "PYTHONPATH": str(modules)}
    command = [sys.executable, *container["command"][1:], *container["args"]]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    repository = models / "repository"
    assert {path.name for path in repository.iterdir() if path.is_dir()} == {
        "preprocessing",
        "postprocessing",
        "tensorrt_llm",
        "chat",
    }
    assert 'name: "chat"\nmax_batch_size: 9\n' in (repository / "chat" / "config.pbtxt").read_text()
    assert '"/mnt/models/tensorrt_llm/1/tokenizer" ""' in (repository / "preprocessing" / "config.pbtxt").read_text()
    assert "'max_seq_len': 4096" in (repository / "tensorrt_llm" / "1" / "engine" / "config.json").read_text()
    assert (repository / "tensorrt_llm" / "1" / "tokenizer" / "tokenizer.json").exists()
    assert "not given: optional_one" in said
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "is built already" in again
    # A placeholder outside of a string that the script does not know is an error that names it.
    (templates / "ensemble" / "config.pbtxt").write_text("count: ${unheard_of}\n")
    (repository / ".built.json").write_text("{}")
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "asks for unheard_of" in failed.stderr
