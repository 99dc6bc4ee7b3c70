"""What V1 and V2 need of the engine, whoever stands in front of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from kserve_vllm.core.types import ModelInfo, Piece, TextJob


class TextEngine(Protocol):
    """Continues text, or pools it; `engine.text_tasks.TextTasks`, or what looks at the texts before it does."""

    @property
    def generates(self) -> bool:
        """Whether the model continues text."""

    @property
    def embeds(self) -> bool:
        """Whether the model gives embeddings."""

    @property
    def classifies(self) -> bool:
        """Whether the model gives class probabilities, or scores of text pairs."""

    @property
    def shows_logprobs(self) -> bool:
        """Whether answers may have log probabilities."""

    @property
    def prioritizes(self) -> bool:
        """Whether requests are scheduled by their priority."""

    @property
    def special_tokens(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens, which stand for no text."""

    @property
    def names(self) -> list[str]:
        """Served names of the base model, first one first."""

    def find(self, name: str) -> ModelInfo | None:
        """What is served under a name, loaded or not, or None."""

    def generate(self, job: TextJob) -> AsyncGenerator[Piece, None]:
        """Continue one prompt; raises `RequestError`. Closing the generator aborts the request in the engine."""

    async def embed(
        self, model: str, texts: Sequence[str], options: Mapping[str, object], request_id: str
    ) -> list[list[float]]:
        """One embedding per text, shape [texts][dimensions]; raises `RequestError`."""

    async def classify(
        self, model: str, texts: Sequence[str], options: Mapping[str, object], request_id: str
    ) -> list[list[float]]:
        """Class probabilities per text, shape [texts][classes]; raises `RequestError`."""

    async def score(
        self,
        model: str,
        queries: Sequence[str],
        documents: Sequence[str],
        options: Mapping[str, object],
        request_id: str,
    ) -> list[float]:
        """One score per pair; a single query is paired with every document; raises `RequestError`."""
