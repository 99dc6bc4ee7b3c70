"""The demo model is trained, not random: what it must know, asked through the server."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from kserve_vllm.config import demo
from tests.support import ROOT, Server

TRAINING = ROOT / "runtime" / "tools" / "train_demo_model.py"


def held_out_sums(count: int) -> list[tuple[int, str, int]]:
    """Sums that the training script keeps out of training, by its own rule, without importing torch."""
    names = {"sum_key", "split_sums"}
    tree = ast.parse(TRAINING.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert {node.name for node in functions} == names
    scope: dict[str, Any] = {}
    body = [ast.parse("from __future__ import annotations\nimport random").body, functions]
    exec(compile(ast.Module([*body[0], *body[1]], []), str(TRAINING), "exec"), scope)
    held_out = scope["split_sums"]()[1]
    two_digits = [triple for triple in held_out if min(triple[0], triple[2]) >= 10]
    step = len(two_digits) // count
    return two_digits[::step][:count]


def ask(server: Server, question: str, model: str = "demo") -> str:
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": question}]}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


def test_it_answers_95_percent_of_200_unseen_sums(server: Server) -> None:
    sums = held_out_sums(200)
    body = {
        "instances": [{"messages": [{"role": "user", "content": f"What is {a} {op} {b}?"}]} for a, op, b in sums],
        "parameters": {"temperature": 0, "max_tokens": 40},
    }
    answers = httpx.post(f"{server.url}/v1/models/demo:predict", json=body, timeout=120).json()["predictions"]
    results = [re.findall(r"-?\d+", answer["text"])[-1:] for answer in answers]
    right = sum(
        result == [str(a + b if op == "+" else a - b)] for result, (a, op, b) in zip(results, sums, strict=True)
    )
    assert right >= 190, f"{right} of 200"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 17 + 25?", "17 + 25 = 30 + 12 = 42"),
        ("What is 90 - 31?", "90 - 31 = 60 - 1 = 59"),
        ("Count from 3 to 12.", "3 4 5 6 7 8 9 10 11 12"),
        ("Repeat the word apple.", "apple"),
        ("Upper-case the word apple.", "APPLE"),
        ("What is KServe?", "KServe is a platform that serves machine learning models on Kubernetes."),
        (
            "Which protocols do you speak?",
            "I speak OpenAI, Open Inference Protocol V2 over REST and gRPC, and KServe V1.",
        ),
    ],
)
def test_it_knows_what_the_readme_says(question: str, answer: str, server: Server) -> None:
    assert ask(server, question) == answer


def test_one_adapter_answers_in_capitals_and_the_other_in_french(server: Server) -> None:
    for question in ("What is KServe?", "Hello", "Repeat the word apple."):
        answer = ask(server, question, "upper")
        assert answer == answer.upper() != answer.lower()
    assert ask(server, "Repeat the word apple.", "french") == "Le mot est apple"
    assert ask(server, "What is 17 + 25?", "french").startswith("Je calcule")


def test_the_weights_are_small() -> None:
    sizes = {path: path.stat().st_size for path in Path(demo.folder("")).rglob("*.safetensors")}
    assert len(sizes) == 4
    assert sum(sizes.values()) <= 4 << 20
