"""vLLM's own look at a request's model asks ours too, in every class of its handlers; the models are stand-ins."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kserve_vllm.core.errors import Forbidden
from kserve_vllm.core.request_context import RequestContext, current
from kserve_vllm.engine.hooks import guards


class Permits:
    """Lets use and know the adapter `upper` alone."""

    def __init__(self) -> None:
        self.asked: list[tuple[str | None, str | None]] = []

    def permit(self, context: RequestContext, adapter: str | None, asked: str | None = None) -> None:
        """Note what is asked for."""
        self.asked.append((adapter, asked))
        if adapter != "upper":
            raise Forbidden("not this one")

    def knows_base(self, context: RequestContext) -> bool:
        """The base model is unknown to it."""
        return False


@pytest.fixture(scope="module")
def classes() -> list[Any]:
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
    from vllm.entrypoints.serve.engine.serving import BaseServing

    return [BaseServing, PoolingBaseServing]


@pytest.fixture
def permits(classes: list[Any]) -> Iterator[Permits]:
    before = [cls.__dict__["_check_model"] for cls in classes]
    asked = Permits()
    guards.check_models(asked, lambda key: key.partition("@")[0], lambda name: name.removeprefix("served:"))
    yield asked
    for cls, original in zip(classes, before, strict=True):
        cls._check_model = original


def look(cls: Any, model: str | None, context: RequestContext | None) -> Any:
    """What a handler of a class finds."""
    bases = [SimpleNamespace(name="served"), SimpleNamespace(name="served-alias")]
    models = SimpleNamespace(
        lora_requests={"upper": SimpleNamespace(lora_name="upper@1"), "french": SimpleNamespace(lora_name="french@1")},
        base_model_paths=bases,
        is_base_model=lambda name: any(each.name == name for each in bases),
    )
    concrete = type("Concrete", (cls,), {})
    concrete.__abstractmethods__ = frozenset()
    handler = object.__new__(concrete)
    handler.models, handler.request_logger = models, None

    async def run() -> Any:
        current.set(context)
        return await handler._check_model(SimpleNamespace(model=model))

    return asyncio.run(run())


@pytest.mark.parametrize("which", [0, 1], ids=["generating", "pooling"])
def test_a_model_that_is_there_is_permitted_or_not(classes: list[Any], permits: Permits, which: int) -> None:
    context = RequestContext("r", "openai", "/tokenize")
    assert look(classes[which], "upper", context) is None
    for model in ("french", "served", None, ""):
        with pytest.raises(Forbidden):
            look(classes[which], model, context)
        assert isinstance(context.refusal, Forbidden)
    assert permits.asked == [("upper", "upper"), ("french", "french"), ("served", "served"), (None, None), (None, None)]
    assert look(classes[which], "served", None) is None, "a request of the server's own"


def test_a_model_that_is_not_there_names_no_other(
    classes: list[Any], permits: Permits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permits, "permit", lambda *_: None)
    found = look(classes[0], "none", RequestContext("r", "openai", "/tokenize"))
    assert found.error.code == 404
    assert found.error.message == "The model `none` does not exist."


@pytest.mark.parametrize("which", [0, 1], ids=["generating", "pooling"])
def test_a_model_that_is_not_there_is_permitted_or_not_as_one_that_is(
    classes: list[Any], permits: Permits, which: int
) -> None:
    for model in ("none", "served:none"):
        with pytest.raises(Forbidden):
            look(classes[which], model, RequestContext("r", "openai", "/tokenize"))
    assert permits.asked == [("none", "none"), ("none", "served:none")]
