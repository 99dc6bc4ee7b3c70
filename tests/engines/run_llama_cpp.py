"""Serve the demo model by llama.cpp with what the chart renders, ask it, and compare with the model's own reference.

Usage: python tests/engines/run_llama_cpp.py [--scratch FOLDER]

NOT part of `make test`: it downloads two PyPI packages (xllamacpp, gguf) into a virtual environment of its own. It
needs no GPU and less than two minutes. What is real: the chart's render, KServe's merge as
tests/charts/kserve_merge.py models it, the start script and every argument and variable of the merged container,
llama.cpp's parser and server, the probes' paths, the test pod's script, the metrics that autoscaling and dashboards
ask for. What differs from a pod: the folder of the model, the port, and tests/engines/llama_server.py in place of the
binary.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path
from typing import Any

from tests.charts import kserve_merge
from tests.charts.support import CHART, ROOT, load, of_kind, render_ci

PACKAGES = ("xllamacpp==2026.10.11549", "gguf==0.19.0", "numpy<3")
MODEL = ROOT / "runtime" / "kserve_vllm" / "demo" / "model"
HERE = Path(__file__).parent
PROMPT = [{"role": "user", "content": "Hello"}]


def environment(scratch: Path) -> Path:
    """A virtual environment with the packages; returns its Python."""
    python = scratch / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(scratch / "venv", with_pip=True)
        print(f"downloading {', '.join(PACKAGES)} ...", flush=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def ask(url: str, body: Any = None) -> tuple[int, bytes]:
    """Status and body of one question; status 0 when nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=100) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def reference(tokens: int) -> str:
    """What Hugging Face's implementation of the model answers, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    # In float32, as in the GGUF file.
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    asked = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**asked, max_new_tokens=tokens, do_sample=False)
    text = tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text)


def run(scratch: Path) -> None:
    """The whole of it; raises AssertionError with what was wrong."""
    python = environment(scratch)
    models = scratch / "models"
    models.mkdir(exist_ok=True)
    subprocess.run([python, HERE / "demo_gguf.py", MODEL, models / "demo.gguf"], check=True)
    program = scratch / "llama-server"
    program.write_text(f'#!/bin/sh\nexec {python} {HERE / "llama_server.py"} "$@"\n')
    program.chmod(0o755)

    documents = render_ci(CHART / "ci" / "llama-cpp-values.yaml")
    service = of_kind(documents, "InferenceService")["chat"]
    runtime = of_kind(documents, "ClusterServingRuntime")[service["spec"]["predictor"]["model"]["runtime"]]
    container = kserve_merge.pod(service, runtime)["spec"]["containers"][0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    facts = load(CHART / "files" / "engines" / "llama-cpp.yaml")
    words = [*container["command"], *kserve_merge.expanded(container)]
    assert words.count("--port=8080") == 1
    changed = {"--port=8080": f"--port={port}", "--host=0.0.0.0": "--host=127.0.0.1", facts["program"]: str(program)}
    command = [changed.get(word, word).replace("/mnt/models", str(models)) for word in words]
    variables = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    print("arguments:", " ".join(words[4:]), flush=True)

    log = (scratch / "server.log").open("w")
    server = subprocess.Popen(
        command, env={"PATH": os.environ["PATH"], **variables}, stdout=log, stderr=subprocess.STDOUT
    )
    base = f"http://127.0.0.1:{port}"
    try:
        seen = set()
        deadline = time.monotonic() + 120
        while (status := ask(base + container["startupProbe"]["httpGet"]["path"])[0]) != 200:
            seen.add(status)
            assert server.poll() is None, (scratch / "server.log").read_text()
            assert time.monotonic() < deadline, f"not ready: {sorted(seen)}"
            time.sleep(0.1)
        # Nobody answers, or it says that it loads: it is never ready before it is.
        assert seen <= {0, 503}, seen
        for kind in ("readiness", "liveness"):
            path = container[f"{kind}Probe"]["httpGet"]["path"]
            assert ask(base + path)[0] == 200, path
        print("ready; startup probe saw", sorted(seen), flush=True)

        status, body = ask(base + "/v1/models")
        assert [model["id"] for model in json.loads(body)["data"]] == ["chat"], body
        wanted = {"model": "chat", "messages": PROMPT, "max_tokens": 24, "temperature": 0, "top_k": 1}
        status, body = ask(base + "/v1/chat/completions", wanted)
        assert status == 200, body
        answer = json.loads(body)["choices"][0]["message"]["content"]
        print("answer:   ", repr(answer), flush=True)
        expected = reference(24)
        print("reference:", repr(expected), flush=True)
        assert answer.strip() == expected.strip()

        pod = of_kind(documents, "Pod")["chat-test"]["spec"]["containers"][0]
        smoke = subprocess.run(
            [sys.executable, *pod["command"][1:], base, *pod["args"][1:]],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert smoke.returncode == 0, smoke.stderr
        print("helm test:", smoke.stdout.strip(), flush=True)

        _, text = ask(base + "/metrics")
        names = set(re.findall(r"^([\w:]+)[ {]", text.decode(), re.MULTILINE))
        metrics = {name for name in facts["metrics"].values() if isinstance(name, str)}
        assert metrics <= names, metrics - names
        print("metrics:  ", ", ".join(sorted(metrics)), flush=True)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
        log.close()


def main(arguments: list[str] | None = None) -> int:
    """Run it in a scratch folder; prints what it saw and returns 0, or raises."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scratch", type=Path, help="a folder to keep (default: a temporary one)")
    options = parser.parse_args(arguments)
    if options.scratch:
        options.scratch.mkdir(parents=True, exist_ok=True)
        run(options.scratch.resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder))
    print("llama.cpp answered as the chart asks it to.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
