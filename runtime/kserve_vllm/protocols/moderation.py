"""Which parts of a request are text that a model may see, and how they are replaced.

Everything is, unless it is known not to be. vLLM's request types grow with every version, ignore fields they don't
know, and hand many fields on to chat templates; a list of the fields that carry text would be a list of the ways around
a moderation. So every string of a request body is looked at, at any depth, whatever the path: contents of messages and
of their parts, names, tool calls and their results, tool definitions with their descriptions, documents, instructions,
suffixes, schemas and choices for structured output, arguments of chat templates. Beyond that:

- The names of fields inside of the body are looked at where they are not the protocols' own: `properties` of a tool, or
  arguments of a template, are text too.
- Whole numbers of seven digits and more are looked at as text, except settings (`seed`) and lists of numbers. A number
  that has to change becomes a string.
- `arguments` of a tool call is JSON in a string; it is decoded, since vLLM decodes it, and what it holds is looked at.
  One that names a field twice is refused.
- Texts of parts that follow each other in one list, of whatever kind, are looked at one by one, then together, joined
  as vLLM and chat templates do (with a line break and without). What matches only then is refused, also where a hook
  would redact: it can't be said which part the replacement belongs to.

Not looked at:
- fields at the top that are known to reach no model (`model`, `user`, `stop`, `encoding_format` and so on: `LEFT_OUT`);
- the protocols' own words (`user`, `text`, `function`: `PROTOCOL_WORDS`) as values of fields that hold no text;
- images, audio and video that the model takes: the base64 of a part of a message whose type says so (`_PARTS`), and
  nothing else that looks like base64. A model that reads text in images can be shown text past a moderation. Where the
  model takes none, such parts are looked at as texts, and so are URLs;
- `/tokenize`, `/detokenize` and the counting of tokens, which put nothing to a model;
- text that is split over several messages, or spelled some other way (look-alike letters, another encoding).

Refused with 400, since it can't be read: prompts given as token ids (a list of numbers in any field at the top that is
not known to choose among tokens: `_NUMBERS`; or in a field called `token_ids` inside of another, as in
`kv_transfer_params`), as embeddings (`prompt_embeds`, as a field or a part), and chat templates of the client's own,
which can compute any text; forms (transcriptions) and bodies that are not JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast

from kserve_vllm.core.errors import InvalidRequest, Refused
from kserve_vllm.core.request_context import current
from kserve_vllm.core.types import ModelInfo, Piece, TextJob
from kserve_vllm.protocols.http import bounds
from kserve_vllm.protocols.text_engine import TextEngine

T = TypeVar("T")
P = ParamSpec("P")
Location = tuple[str | int, ...]
"""Keys and indices from the top of a body to a text. A field's own name is marked by a last element `key`."""

LEFT_OUT = frozenset(
    """model request_id session_id user stop stop_sequences bad_words cache_salt prompt_cache_key service_tier
    encoding_format embed_dtype endianness truncation truncation_side padding task previous_response_id mm_payload
    safety_identifier logit_bias stream_options reasoning_effort output_mode truncate embedding_types input_type
    language to_language include timestamp_granularities guided_decoding_backend""".split()
)
"""Fields at the top of a body that reach no model: they name something, or set how tokens are chosen or returned."""

PROTOCOL_WORDS = frozenset(
    """user assistant system developer tool function text input_text output_text refusal message image_url input_image
    video_url audio_url input_audio image_embeds function_call function_call_output custom tool_use tool_result thinking
    reasoning image base64 url ephemeral object string number integer boolean array null auto none required json_object
    json_schema wav mp3 low high""".split()
)
"""Values that the protocols themselves use, and no text where they do: not in the fields of `_SAID`."""
_SAID = frozenset(
    """content text thinking refusal reasoning reasoning_content input prompt suffix instructions instruction query
    queries documents output arguments system text_1 text_2 data_1 data_2""".split()
)
"""Fields that hold what is said. A word in a part of a message may go on in the next part."""

_NAMES = PROTOCOL_WORDS | frozenset(
    """messages content role type name id tool_calls tool_call_id tool_use_id arguments input prompt tools tool_choice
    parameters properties description strict items enum additionalProperties input_schema cache_control source
    media_type data format detail documents document queries query instructions instruction summary status call_id
    output suffix reasoning_content annotations logprobs response_format schema structured_outputs regex grammar choice
    json chat_template_kwargs enable_thinking add_generation_prompt metadata text_1 text_2 data_1 data_2
    title index default""".split()
)
"""Names of fields that the protocols themselves use, and no text."""

_PARTS: Mapping[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "image_url": ("image", (("image_url", "url"), ("image_url",))),
    "input_image": ("image", (("image_url",),)),
    "image": ("image", (("source", "data"),)),
    "video_url": ("video", (("video_url", "url"), ("video_url",))),
    "audio_url": ("audio", (("audio_url", "url"), ("audio_url",))),
    "input_audio": ("audio", (("input_audio", "data"),)),
}
"""Types of parts that bring a medium, and where in the part it stands: a data URL, or base64 below `data`."""
_NUMBERS = frozenset({"stop_token_ids", "allowed_token_ids", "logprob_token_ids", "label_token_ids"})
"""Fields at the top of a body whose lists of numbers choose among tokens; in any other they are a text as token ids."""
_EXEMPT = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
_BASE64 = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_")
_MEDIA_TYPE = re.compile(r"data:[a-z]+/[a-zA-Z0-9.+-]{1,64}(;codecs=[a-zA-Z0-9.]{1,16})?;base64")
MAX_VALUES = 50_000
_FEW_VALUES = 2_000
_PART_TEXTS = ("text", "thinking", "refusal")


class Hooks(Protocol):
    """What is needed of the moderation."""

    media: frozenset[str]
    """What the model takes beside text: `image`, `audio`, `video`."""

    def looks_at(self, where: Literal["prompt", "answer"], tenant: str) -> bool:
        """Whether any hook looks at prompts, or answers, of a tenant."""

    def reads(self, where: Literal["prompt", "answer"]) -> bool:
        """Whether any hook looks at prompts, or answers, of anyone."""

    async def prompt(self, texts: list[str], tenant: str) -> list[str]:
        """The texts as the model may see them; the same list where nothing was changed."""


def texts_of(path: str, body: object, media: frozenset[str] = frozenset()) -> list[tuple[Location, str]]:
    """All texts of a request body, in the order in which `replace_texts` takes them.

    Args:
        path: the request's path.
        body: its parsed JSON.
        media: what the model takes beside text.

    Raises:
        InvalidRequest: the prompt is given in a way that can't be read.
    """
    if path.rstrip("/") in _EXEMPT:
        return []
    found: list[tuple[Location, str]] = []

    def note(location: Location, text: str) -> str:
        found.append((location, text))
        return text

    _count(body)
    try:
        check_readable(body)
        _rebuild(body, (), note, _media_in(body, media))
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply", field="body") from None
    return found


def replace_texts(path: str, body: T, texts: Sequence[str], media: frozenset[str] = frozenset()) -> T:
    """The body with its texts replaced, in the order of `texts_of`; the body itself is left alone."""
    if path.rstrip("/") in _EXEMPT:
        return body
    rest = iter(texts)
    # A tree of the same form: texts become texts.
    return cast(T, _rebuild(body, (), lambda location, text: next(rest), _media_in(body, media)))


async def moderate_tree(path: str, body: T, moderation: Hooks, tenant: str) -> T:
    """A parsed body as the model may see it; the same object where nothing was changed.

    Raises:
        InvalidRequest: the prompt is given in a way that can't be read.
        Refused, Unavailable: as `Moderation.prompt`.
    """
    if not moderation.looks_at("prompt", tenant):
        return body
    found = await _aside(body, texts_of, path, body, moderation.media)
    texts = [text for _, text in found]
    if not texts:
        return body
    passed = await moderation.prompt(texts, tenant)
    await _check_joined([location for location, _ in found], passed, moderation, tenant)
    if passed is texts:
        return body
    return await _aside(body, replace_texts, path, body, passed, moderation.media)


async def _aside(body: object, look: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
    """Look at a small body here, and at one of many values in a thread, beside which the event loop goes on."""
    if _count(body) <= _FEW_VALUES:
        return look(*args, **named)
    return await asyncio.to_thread(look, *args, **named)


async def moderate_body(path: str, raw: bytes, moderation: Hooks, tenant: str) -> bytes:
    """The body of a request as the model may see it; the same object where nothing was changed.

    It is parsed as Starlette parses it, so that what is looked at is what vLLM gets to see.

    Raises:
        InvalidRequest: it is no JSON, or can't be read.
        Refused, Unavailable: as `Moderation.prompt`.
    """
    if not moderation.looks_at("prompt", tenant) or path.rstrip("/") in _EXEMPT:
        return raw
    if await bounds.has_more_values(raw, MAX_VALUES):
        raise _too_many()
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise InvalidRequest(
            "prompts are moderated here, and the body is no JSON that can be read", field="body"
        ) from None
    passed = await moderate_tree(path, body, moderation, tenant)
    return raw if passed is body else json.dumps(passed).encode()


async def moderate_job(job: TextJob, moderation: Hooks, tenant: str) -> TextJob:
    """A job as the model may see it; the same object where nothing was changed.

    Raises:
        InvalidRequest: its prompt is given as token ids.
        Refused, Unavailable: as `Moderation.prompt`.
    """
    body: dict[str, Any] = dict(job.options)
    if job.prompt is not None:
        body["prompt"] = job.prompt if isinstance(job.prompt, str) else list(job.prompt)
    if job.messages is not None:
        body["messages"] = list(job.messages)
    passed = await moderate_tree("", body, moderation, tenant)
    if passed is body:
        return job
    return replace(
        job,
        prompt=passed.pop("prompt", None),
        messages=passed.pop("messages", None),
        options=passed,
    )


async def moderate_texts(texts: Sequence[str], moderation: Hooks, tenant: str) -> Sequence[str]:
    """Inputs of `embed`, `score` or `classify` as the model may see them; the same object where nothing was changed.

    Raises:
        InvalidRequest: they are given as token ids.
        Refused, Unavailable: as `Moderation.prompt`.
    """
    body = {"input": list(texts)}
    passed = await moderate_tree("", body, moderation, tenant)
    return texts if passed is body else passed["input"]


def check_content_type(content_type: str | None) -> None:
    """Refuse a request whose body is a form: its texts can't be found.

    Raises:
        InvalidRequest: it is one.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind.startswith("multipart/") or kind == "application/x-www-form-urlencoded":
        raise InvalidRequest("prompts are moderated here, and forms can't be read", field="body")


_SPELLED_OUT = ("return_token_ids", "return_tokens_as_token_ids", "use_beam_search", "enable_response_messages")
# Where these bytes are, a name may be spelled in another way: escaped, or in UTF-16 or 32.
_OTHER_SPELLING = (b"\\", b"\0")


def check_answer_form(path: str, raw: bytes, moderation: Hooks, tenant: str) -> None:
    """Refuse what would show a moderated answer in another form than its text.

    Raises:
        InvalidRequest: token ids of the answer are asked for, or a search that assembles its text elsewhere.
    """
    if not moderation.looks_at("answer", tenant):
        return
    sentence = "answers are moderated here, and {} would show them unmoderated"
    if path == "/inference/v1/generate":
        raise InvalidRequest(sentence.format("token ids"))
    if not any(name in raw for name in (*_OTHER_SPELLING, *(name.encode() for name in _SPELLED_OUT))):
        return
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return
    for name in _SPELLED_OUT:
        if isinstance(body, dict) and body.get(name):
            raise InvalidRequest(sentence.format(name), field=name)


class ModeratedEngine:
    """The engine for V1 and V2: what goes in is moderated first. What comes out is moderated in the engine room.

    It has what is written here and nothing else: work that the engine learns to do is not to be had from it until
    someone says how its texts are moderated.

    Args:
        engine: does the work.
        moderation: looks at the texts.
    """

    def __init__(self, engine: TextEngine, moderation: Hooks) -> None:
        self._engine = engine
        self._moderation = moderation

    @property
    def generates(self) -> bool:
        """Whether the model continues text."""
        return self._engine.generates

    @property
    def embeds(self) -> bool:
        """Whether the model gives embeddings."""
        return self._engine.embeds

    @property
    def classifies(self) -> bool:
        """Whether the model gives class probabilities, or scores of text pairs."""
        return self._engine.classifies

    @property
    def shows_logprobs(self) -> bool:
        """Whether answers may have log probabilities, which spell them out."""
        return not self._moderation.reads("answer")

    @property
    def prioritizes(self) -> bool:
        """Whether requests are scheduled by their priority."""
        return self._engine.prioritizes

    @property
    def special_tokens(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens, which stand for no text."""
        return self._engine.special_tokens

    @property
    def names(self) -> list[str]:
        """Served names of the base model; as the engine's."""
        return self._engine.names

    def find(self, name: str) -> ModelInfo | None:
        """What is served under a name; as the engine's."""
        return self._engine.find(name)

    async def generate(self, job: TextJob) -> AsyncGenerator[Piece, None]:
        """Continue one prompt; as the engine's."""
        tenant = _tenant()
        if self._moderation.looks_at("answer", tenant) and job.prompt is not None and not isinstance(job.prompt, str):
            raise InvalidRequest("answers are moderated here, and token ids would show them unmoderated")
        passed = await moderate_job(job, self._moderation, tenant)
        async with contextlib.aclosing(self._engine.generate(passed)) as pieces:
            async for piece in pieces:
                yield piece

    async def embed(
        self, model: str, texts: Sequence[str], options: Mapping[str, object], request_id: str
    ) -> list[list[float]]:
        """Embeddings of texts; as the engine's."""
        passed = await moderate_texts(texts, self._moderation, _tenant())
        return await self._engine.embed(model, passed, options, request_id)

    async def classify(
        self, model: str, texts: Sequence[str], options: Mapping[str, object], request_id: str
    ) -> list[list[float]]:
        """Class probabilities of texts; as the engine's."""
        passed = await moderate_texts(texts, self._moderation, _tenant())
        return await self._engine.classify(model, passed, options, request_id)

    async def score(
        self,
        model: str,
        queries: Sequence[str],
        documents: Sequence[str],
        options: Mapping[str, object],
        request_id: str,
    ) -> list[float]:
        """Scores of pairs; as the engine's."""
        first = await moderate_texts(queries, self._moderation, _tenant())
        second = await moderate_texts(documents, self._moderation, _tenant())
        return await self._engine.score(model, first, second, options, request_id)


def _tenant() -> str:
    context = current.get()
    return context.access.tenant if context is not None else ""


def _rebuild(
    tree: object, at: Location, visit: Callable[[Location, str], str], apart: frozenset[Location] = frozenset()
) -> object:
    """The tree with `visit` called on each text that is not `apart`; branches without a change are the same objects."""
    if isinstance(tree, str):
        if not tree or at in apart or (tree in PROTOCOL_WORDS and not _is_said(at)):
            return tree
        return visit(at, tree)
    if isinstance(tree, Mapping):
        return _rebuild_object(tree, at, visit, apart)
    if isinstance(tree, list | tuple):
        items = [
            item if isinstance(item, int | float) else _rebuild(item, (*at, index), visit, apart)
            for index, item in enumerate(tree)
        ]
        return tree if all(new is old for new, old in zip(items, tree, strict=True)) else items
    if len(at) > 1 and isinstance(tree, int | float) and not isinstance(tree, bool) and abs(tree) >= 1_000_000:
        text = _number(tree)
        new = visit(at, text)
        return tree if new == text else new
    return tree


def _is_said(at: Location) -> bool:
    """Whether a text stands where texts do, so that a word of the protocols is a word there, too."""
    return next((part for part in reversed(at) if isinstance(part, str)), None) in _SAID


def _rebuild_object(
    tree: Mapping[str, object], at: Location, visit: Callable[[Location, str], str], apart: frozenset[Location]
) -> object:
    new: dict[str, object] = {}
    same = True
    for key, value in tree.items():
        name = key
        if at:
            if key not in _NAMES and isinstance(key, str) and key:
                name = visit((*at, key, "key"), key)
        elif key in LEFT_OUT:
            new[key] = value
            continue
        inner = _decoded(value) if key == "arguments" and isinstance(value, str) else None
        if inner is not None:
            changed = _rebuild(inner, (*at, key), visit)
            passed = value if changed is inner else json.dumps(changed, ensure_ascii=False)
        else:
            passed = _rebuild(value, (*at, key), visit, apart)
        same = same and name == key and passed is value
        new[name] = passed
    return tree if same else new


def _decoded(text: str) -> object:
    try:
        tree = json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict | list) else None


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object whose names are each there once: of two values one would be looked at, and both may be handed on."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InvalidRequest("prompts are moderated here, and arguments names a field twice", field="arguments")
    return found


def _number(value: int | float) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e20:
        return str(int(value))
    try:
        return str(value)
    except ValueError:  # thousands of digits
        return ""


def _media_in(body: object, media: frozenset[str]) -> frozenset[Location]:
    """Where in a body there are media that the model takes: in parts of messages, and nowhere else."""
    if not media or not isinstance(body, Mapping):
        return frozenset()
    found: list[Location] = []
    for field in ("messages", "input"):
        for at, message in _items(body.get(field), (field,)):
            # A conversation, or a list of several.
            for inner_at, inner in _items(message, at) if isinstance(message, list) else [(at, message)]:
                if isinstance(inner, Mapping):
                    for part_at, part in _items(inner.get("content"), (*inner_at, "content")):
                        found += _media_of(part, part_at, media)
    return frozenset(found)


def _items(value: object, at: Location) -> Iterator[tuple[Location, object]]:
    return (((*at, index), item) for index, item in enumerate(value if isinstance(value, list | tuple) else ()))


def _media_of(part: object, at: Location, media: frozenset[str]) -> Iterator[Location]:
    """Where a part holds a medium that the model takes."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    medium, places = _PARTS.get(kind, ("", ())) if isinstance(kind, str) else ("", ())
    if medium not in media:
        return
    for place in places:
        value = part
        for key in place:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, str) and _is_medium(value, medium, bare=place[-1] == "data"):
            yield (*at, *place)


def _is_medium(text: str, medium: str, bare: bool) -> bool:
    """Whether a text is base64 throughout: bare, or as a data URL of a medium."""
    if not bare:
        head, comma, text = text.partition(",")
        if not comma or len(head) > 127 or not head.startswith(f"data:{medium}/") or not head.endswith(";base64"):
            return False
        if not _MEDIA_TYPE.fullmatch(head):
            return False
    return _BASE64.issuperset(text)


def _count(body: object) -> int:
    """The values of a body.

    Raises:
        InvalidRequest: there are so many that a walk over it would take too long.
    """
    trees, count = [body], 0
    while trees:
        tree = trees.pop()
        if isinstance(tree, Mapping | list | tuple):
            count += len(tree)
            if count > MAX_VALUES:
                raise _too_many()
            trees.extend(tree.values() if isinstance(tree, Mapping) else tree)
    return count


def _too_many() -> InvalidRequest:
    return InvalidRequest(f"prompts are moderated here, and the body has more than {MAX_VALUES} values", field="body")


def check_readable(body: object) -> None:
    """Raise `InvalidRequest` for a prompt that no filter of text can read: token ids, embeddings."""
    if not isinstance(body, Mapping):
        return
    for field, value in body.items():
        if field not in _NUMBERS and _holds_numbers(value):
            raise InvalidRequest(f"prompts are moderated here, so {field} must be text and not token ids", field=field)
        if field not in _NUMBERS and (name := _token_ids_in(value)):
            raise InvalidRequest(
                f"prompts are moderated here, so they must be text and not {field}.{name}", field=field
            )
    kwargs = body.get("chat_template_kwargs")
    own_template = body.get("chat_template") or (isinstance(kwargs, Mapping) and kwargs.get("chat_template"))
    if own_template:
        raise InvalidRequest(
            "prompts are moderated here, so a request can't bring a chat template", field="chat_template"
        )
    if body.get("prompt_embeds") or any(_embeds(body.get(field)) for field in ("messages", "input", "data")):
        raise InvalidRequest(
            "prompts are moderated here, so they must be text and not embeddings", field="prompt_embeds"
        )


def _holds_numbers(value: object, depth: int = 0) -> bool:
    if isinstance(value, list | tuple):
        return depth < 4 and any(isinstance(item, int | float) or _holds_numbers(item, depth + 1) for item in value)
    return False


def _token_ids_in(value: object) -> str | None:
    """The path of a field that holds a text as token ids, as `kv_transfer_params.prompt_token_ids` does; or None."""
    for at, inner in _below(value):
        name = at[-1] if at else ""
        if name.endswith("token_ids") and name not in _NUMBERS and _holds_numbers(inner):
            return ".".join(at)
    return None


def _embeds(value: object) -> bool:
    """Whether a conversation, or several, holds a part of the type `prompt_embeds`."""
    # vLLM goes by the name where a part has no type, or an id.
    return any(
        isinstance(inner, Mapping) and (inner.get("type") == "prompt_embeds" or "prompt_embeds" in inner)
        for _, inner in _below(value)
    )


def _below(value: object) -> Iterator[tuple[tuple[str, ...], object]]:
    """A value and what is in it, with the names that lead there. No recursion: a client decides how deep it goes."""
    left: list[tuple[tuple[str, ...], object]] = [((), value)]
    while left:
        at, inner = left.pop()
        yield at, inner
        if isinstance(inner, Mapping):
            left.extend(((*at, str(name)), each) for name, each in inner.items() if _may_hold(each))
        elif isinstance(inner, list | tuple):
            left.extend((at, each) for each in inner if _may_hold(each))


def _may_hold(value: object) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _joinable(locations: Sequence[Location]) -> Iterator[list[int]]:
    """Groups of texts, by their index, that are parts of one list."""
    groups: dict[tuple[str | int, ...], list[int]] = {}
    for index, at in enumerate(locations):
        if len(at) > 2 and at[-1] in _PART_TEXTS and isinstance(at[-2], int):
            groups.setdefault(at[:-2], []).append(index)
        elif len(at) > 2 and at[-2] == "content" and isinstance(at[-1], int):
            # A part may be a text by itself.
            groups.setdefault(at[:-1], []).append(index)
    return (group for group in groups.values() if len(group) > 1)


async def _check_joined(locations: Sequence[Location], texts: Sequence[str], moderation: Hooks, tenant: str) -> None:
    """Refuse what only matches across the parts of one list.

    A text is compared with what becomes of its parts a second time, since what replaced a match may match again.

    Raises:
        Refused: there is such a match.
    """
    asked: list[str] = []
    spans = []
    for group in _joinable(locations):
        parts = [texts[index] for index in group]
        begin = len(asked)
        asked += ["\n".join(parts), "".join(parts), *parts]
        spans.append(slice(begin, len(asked)))
    if not asked:
        return
    answered = await moderation.prompt(asked, tenant)
    for again in (answered[span] for span in spans):
        if again[0] != "\n".join(again[2:]) or again[1] != "".join(again[2:]):
            raise Refused(
                "the moderation does not let this prompt pass: what it would take out stands across several "
                "parts of a message",
                reason="moderation",
            )
