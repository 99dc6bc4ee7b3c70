"""lm-eval's two clients on a task of our own: as `vllm serve` answers, to the last digit.

Greedy answers and log-likelihoods; float32, and one request at a time, so that no batch's size decides a tie.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kserve_vllm.config import demo
from tests.benchmarks.servers import Configuration, Running
from tests.compat.base import RUN_WITHIN_S, Case, Folder, Suite, Target, one_line

_PINNED = ("lm-eval==0.4.13", "transformers==5.19.0", "tenacity==9.2.1", "aiohttp", "requests")
_ENGINE = ("--dtype", "float32", "--max-num-seqs", "1")
_SUMS = [
    {"question": f"What is {a} + {b}?", "answer": str(a + b), "wrong": str(a + b + 1)}
    for a in (2, 7)
    for b in (1, 3, 6)
]
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}} "
num_fewshot: 0
"""
_TASKS = {
    "sums_generated": """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "sums_chosen": """
output_type: multiple_choice
doc_to_choice: "{{[answer, wrong]}}"
doc_to_target: 0
metric_list: [{metric: acc}]
""",
}
# What is asked of which client: log-likelihoods are completions'.
_ASKED = {
    "local-completions": ("/v1/completions", ["sums_generated", "sums_chosen"]),
    "local-chat-completions": ("/v1/chat/completions", ["sums_generated"]),
}


def _ask(python: Path, url: str, folder: Path, name: str) -> dict[str, list[Any]]:
    """Answers of each task by lm-eval's log of samples, in the order of the documents."""
    path, tasks = _ASKED[name]
    where = folder / "out" / f"{name}-{url.rsplit(':', 1)[1]}"
    tokenizer = str(demo.folder("model"))
    model = (
        f"model=demo,base_url={url}{path},num_concurrent=1,max_retries=1,tokenized_requests=False,tokenizer={tokenizer}"
    )
    command = [str(python.parent / "lm_eval"), "--model", name, "--model_args", model, "--tasks", ",".join(tasks)]
    command += ["--include_path", str(folder / "tasks"), "--log_samples", "--output_path", str(where)]
    if name == "local-chat-completions":
        command.append("--apply_chat_template")
    env = {
        **os.environ,
        "PYTHONPATH": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "OPENAI_API_KEY": "none",
    }
    done = subprocess.run(
        command, env=env, cwd=folder, capture_output=True, text=True, timeout=RUN_WITHIN_S, check=False
    )
    if done.returncode:
        raise RuntimeError(one_line(done.stderr[-400:], 400))
    return dict(_samples(where))


def _samples(where: Path) -> Iterator[tuple[str, list[Any]]]:
    for file in sorted(where.rglob("samples_*.jsonl")):
        lines = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda each: each["doc_id"])
        yield file.name.removeprefix("samples_")[:-7].rsplit("_", 1)[0], [each["resps"] for each in lines]


def _run(target: Target, folder: Path) -> list[Case]:
    del target  # both servers are started here, with the same flags
    python = Folder(folder / "lm-eval").python(*_PINNED)
    where = folder / "lm-eval"
    (where / "tasks").mkdir(exist_ok=True)
    data = where / "sums.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in _SUMS))
    for name, task in _TASKS.items():
        (where / "tasks" / f"{name}.yaml").write_text(_TASK.format(name=name, data=data) + task)
    found: dict[bool, dict[str, Any]] = {}
    for ours in (True, False):
        server = Running(Configuration("ours" if ours else "vllm", ours=ours), _ENGINE)
        try:
            found[ours] = {
                name: _attempt(python, f"http://127.0.0.1:{server.http_port}", where, name) for name in _ASKED
            }
        finally:
            server.stop()
    cases = []
    for name, (_, tasks) in _ASKED.items():
        for task in tasks:
            ours, theirs = found[True][name], found[False][name]
            same = isinstance(ours, dict) and ours == theirs and len(ours.get(task, ())) == len(_SUMS)
            detail = "" if same else one_line(f"ours {ours!r}, vllm serve {theirs!r}")
            cases.append(Case(f"{name}: {task}", "passed" if same else "failed", detail))
    return cases


def _attempt(python: Path, url: str, where: Path, name: str) -> Any:
    try:
        return _ask(python, url, where, name)
    except RuntimeError as error:
        return str(error)


SUITES = [
    Suite(
        "lm-eval",
        "answers and log-likelihoods equal to `vllm serve`'s to the last digit",
        f"PyPI {', '.join(_PINNED[:2])}",
        _run,
    )
]
