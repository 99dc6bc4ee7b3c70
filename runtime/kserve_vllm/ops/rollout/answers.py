"""Answers of the canary beside those of the stable version: the same prompts at temperature 0, before any traffic."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.rollout.judge import Check, Phase

# How refusals begin, in the words of common models; --refusal-pattern replaces it.
REFUSAL = (
    r"^\W*(i'?m sorry|i am sorry|sorry,|i can(no|')t|i cannot|i'?m (not able|unable)|i am (not able|unable)|as an ai\b"
    r"|i must decline|i won'?t)"
)


@dataclass(frozen=True)
class VersionAnswer:
    """What a version said to a prompt.

    Attributes:
        text: the answer.
        refused: whether it, or the moderation, declined.
        failed: whether there was none.
    """

    text: str
    refused: bool
    failed: bool


@dataclass(frozen=True)
class Allowed:
    """What answers may differ in.

    Attributes:
        min_equal: the least share of equal answers; 0 where a new model is meant to answer otherwise.
        length_drift: by what share the mean length, in words, may differ.
        refusal_drift: by what share more prompts may be refused.
    """

    min_equal: float = 0.0
    length_drift: float = 0.5
    refusal_drift: float = 0.05


Ask = Callable[[str, dict[str, Any]], tuple[int, str]]


def read_prompts(path: Path) -> list[Any]:
    """Prompts of a file: a line each, plain text or JSON (a string, or `{"prompt": ...}` or `{"messages": [...]}`).

    Raises:
        ConfigError: it can't be read, or has none.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error
    if not lines:
        raise ConfigError(f"{path} has no prompts")
    out: list[Any] = []
    for number, line in enumerate(lines, 1):
        if not line.startswith(("{", '"')):
            out.append(line)
            continue
        try:
            prompt = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        if isinstance(prompt, dict) and not {"prompt", "messages"} & set(prompt):
            raise ConfigError(f"{path}, line {number}: neither prompt nor messages")
        out.append(prompt)
    return out


def ask_all(
    ask: Ask, model: str, prompts: Sequence[Any], max_tokens: int, refusal: str = REFUSAL
) -> list[VersionAnswer]:
    """Put each prompt to one version, one after the other.

    Args:
        ask: sends a path and a body and gives status and text.
        model: its served name.
        prompts: as `read_prompts` gives them.
        max_tokens: of each answer.
        refusal: a pattern for texts that refuse.
    """
    pattern = re.compile(refusal, re.IGNORECASE)
    out = []
    for prompt in prompts:
        body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": max_tokens}
        body |= prompt if isinstance(prompt, dict) else {"prompt": prompt}
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        status, text = ask(path, body)
        out.append(_answer(status, text, pattern))
    return out


def _answer(status: int, text: str, refusal: re.Pattern[str]) -> VersionAnswer:
    try:
        body = json.loads(text)
        if status != 200:
            kind = body.get("error", {}).get("type", "")
            return VersionAnswer("", kind == "content_filter", kind != "content_filter")
        choice = body["choices"][0]
        said = str(choice["message"]["content"] or "") if "message" in choice else str(choice["text"])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return VersionAnswer("", False, True)
    refused = choice.get("finish_reason") == "content_filter" or bool(refusal.search(said))
    return VersionAnswer(said, refused, False)


def compare(canary: Sequence[VersionAnswer], stable: Sequence[VersionAnswer], allowed: Allowed) -> list[Check]:
    """Equality, length and refusals of two versions' answers to the same prompts.

    Prompts that the stable version could not answer say nothing about the canary and are left out.
    """
    pairs = [(mine, theirs) for mine, theirs in zip(canary, stable, strict=True) if not theirs.failed]
    if not pairs:
        return [Check("answers", "Inconclusive", 0, 0, "the stable version answered no prompt")]
    n = len(pairs)
    failed = sum(mine.failed for mine, _ in pairs)
    checks = [
        _check("answers-failed", failed / n, 0.0, failed > 0, f"the canary failed {failed} of {n} prompts"),
    ]
    equal = sum(mine.text == theirs.text for mine, theirs in pairs) / n
    checks.append(
        _check(
            "answers-equal",
            equal,
            1.0,
            equal < allowed.min_equal,
            f"{100 * equal:.1f} % of {n} answers are equal; at least {100 * allowed.min_equal:g} % must be",
        )
    )
    mine_length = statistics.fmean(len(mine.text.split()) for mine, _ in pairs)
    length = statistics.fmean(len(theirs.text.split()) for _, theirs in pairs)
    drift = abs(mine_length - length) / max(length, 1.0)
    checks.append(
        _check(
            "answers-length",
            mine_length,
            length,
            drift > allowed.length_drift,
            f"{mine_length:.1f} words on the mean, stable {length:.1f}: {100 * drift:.0f} % apart, allowed "
            f"{100 * allowed.length_drift:g} %",
        )
    )
    mine_refused, refused = (sum(a.refused for a in side) / n for side in zip(*pairs, strict=True))
    more = mine_refused - refused
    checks.append(
        _check(
            "answers-refused",
            mine_refused,
            refused,
            more > allowed.refusal_drift,
            f"{100 * mine_refused:.1f} % refused, stable {100 * refused:.1f} %; allowed "
            f"{100 * allowed.refusal_drift:g} points more",
        )
    )
    return checks


def _check(metric: str, canary: float, stable: float, bad: bool, words: str) -> Check:
    phase: Phase = "Failed" if bad else "Successful"
    return Check(metric, phase, canary, stable, words)
