"""What a benchmark sends: prompts from a file, or made to a shape."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kserve_vllm.core.errors import ConfigError

# Words that most vocabularies hold whole, so that a prompt's tokens follow from its words.
_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information"
).split()
_FEWEST_WORDS = 1


@dataclass(frozen=True, slots=True)
class LoadPrompt:
    """One request's input.

    Attributes:
        text: of the prompt; with `messages`, their texts joined, for protocols that know no messages.
        output: most tokens of the answer.
        messages: of a chat, or None for one message of the user's.
    """

    text: str
    output: int
    messages: Sequence[object] | None = None


class Prompts(Protocol):
    """A source of prompts that never ends; the same index gives the same prompt."""

    def __getitem__(self, index: int) -> LoadPrompt:
        """The prompt with a number."""

    def describe(self) -> dict[str, object]:
        """What it is, for the result."""


@dataclass(frozen=True)
class WordCount:
    """How a server counts words as tokens: `fixed + per_word * words`, measured with two short prompts.

    Attributes:
        fixed: tokens of an empty prompt, such as those of a chat template.
        per_word: tokens of one of our words with the space before it.
        measured: False where the server does not say how many tokens a prompt had.
    """

    fixed: float = 0.0
    per_word: float = 4 / 3
    measured: bool = False

    def words(self, tokens: float) -> int:
        """Words of a prompt with about so many tokens."""
        return max(_FEWEST_WORDS, round((tokens - self.fixed) / self.per_word))


@dataclass(frozen=True)
class PromptShape:
    """Prompts of random words.

    Attributes:
        prompt, output: mean tokens.
        spread: deviation of the logarithm of both lengths; 0 gives the means alone.
        shared_prefix: share of each prompt that is the same in all of them, 0 to 1.
        count: how the server counts.
        seed: the same seed gives the same prompts.
    """

    prompt: int
    output: int
    spread: float
    shared_prefix: float
    count: WordCount
    seed: int

    def __getitem__(self, index: int) -> LoadPrompt:
        """The prompt with a number."""
        dice = random.Random(f"{self.seed}/{index}")  # noqa: S311 - a benchmark has to be repeatable
        words = self.count.words(self._length(dice, self.prompt))
        same = random.Random(self.seed)  # noqa: S311
        shared = min(int(self.count.words(self.prompt) * self.shared_prefix), words)
        text = [same.choice(_WORDS) for _ in range(shared)]
        text += [dice.choice(_WORDS) for _ in range(words - shared)]
        return LoadPrompt(" ".join(text), self._length(dice, self.output))

    def _length(self, dice: random.Random, mean: int) -> int:
        if not self.spread:
            return mean
        return max(1, round(dice.lognormvariate(math.log(mean) - self.spread**2 / 2, self.spread)))

    def describe(self) -> dict[str, object]:
        """What it is, for the result."""
        return {
            "prompt": self.prompt,
            "output": self.output,
            "spread": self.spread,
            "shared_prefix": self.shared_prefix,
            "seed": self.seed,
        }


class FromFile:
    """Prompts of a file, over and over again.

    Args:
        path: JSON lines, each with `prompt` (or `text_input`) or with `messages`; and, if the answers' lengths differ,
            `max_tokens` (or `output_tokens`, as vLLM's custom data set has it).
        output: most tokens of an answer where a line does not say.

    Raises:
        ConfigError: the file can't be read, or a line has no prompt.
    """

    def __init__(self, path: Path, output: int) -> None:
        self._name = path.name
        self._found: list[LoadPrompt] = []
        try:
            with path.open(encoding="utf-8") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        self._found.append(_read_line(json.loads(line), output, number))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--prompts {path}: {error}") from None
        if not self._found:
            raise ConfigError(f"--prompts {path}: no prompt in it")

    def __getitem__(self, index: int) -> LoadPrompt:
        """The prompt with a number."""
        return self._found[index % len(self._found)]

    def describe(self) -> dict[str, object]:
        """What it is, for the result."""
        return {"file": self._name, "prompts": len(self._found)}


def _read_line(row: object, output: int, number: int) -> LoadPrompt:
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no object")
    most = row.get("max_tokens", row.get("output_tokens", output))
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"line {number}: max_tokens is not a whole number above 0")
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(each, dict) for each in messages):
        return LoadPrompt("\n".join(str(each.get("content", "")) for each in messages), most, messages)
    for name in ("prompt", "text_input"):
        if isinstance(row.get(name), str):
            return LoadPrompt(row[name], most)
    raise ValueError(f"line {number} has neither prompt nor messages")
