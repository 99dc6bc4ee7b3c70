"""Moderation hooks: patterns, an endpoint and Python code, over prompts and over answers that grow."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kserve_vllm.core.errors import ConfigError, Refused, RequestError, Unavailable
from kserve_vllm.policy.moderation.hooks import Moderation
from tests.services import Endpoint

CARD = {"regex": r"\b(?:\d[ -]?){12,15}\d\b", "replacement": "[card]"}
MAIL = {"regex": r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[a-zA-Z]{2,}", "replacement": "[mail]"}
CODE_NAME = {"literal": "project falcon", "ignore_case": True, "replacement": "the project"}
REDACT = {"name": "privacy", "action": "redact", "patterns": [CARD, MAIL, CODE_NAME]}
REFUSE = {"name": "no-falcon", "action": "refuse", "patterns": [{"literal": "falcon"}]}
# Takes longer than anyone waits: every way of cutting the word is tried.
CATASTROPHIC = {"regex": r"(?:(\w|\w\w)+)+!\1"}

Make = Callable[..., Moderation]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A moderation with some hooks."""

    def build(*hooks: dict[str, Any], **options: Any) -> Moderation:
        path = tmp_path / "moderation.yaml"
        path.write_text(yaml.safe_dump({"hooks": list(hooks)}))
        return Moderation(path, **options)

    return build


def prompt(moderation: Moderation, *texts: str, tenant: str = "t") -> list[str]:
    async def ask() -> list[str]:
        try:
            return await moderation.prompt(list(texts), tenant)
        finally:
            await moderation.close()

    return run(ask())


def answer(moderation: Moderation, *pieces: str, tenant: str = "t") -> tuple[list[str], RequestError | None]:
    """What passed at each feed and at the end, and what ended it."""

    async def read() -> tuple[list[str], RequestError | None]:
        passed: list[str] = []
        reader = moderation.answer(tenant)
        assert reader is not None
        try:
            for piece in pieces:
                passed.append(await reader.feed(piece))
            passed.append(await reader.finish())
        except RequestError as error:
            return [*passed, reader.rest], error
        finally:
            await moderation.close()
        return passed, None

    return run(read())


# Patterns on prompts


def test_card_numbers_and_addresses_are_taken_out_of_prompts(make: Make) -> None:
    texts = ["Pay with 4111 1111-1111 1111, please", "I am jo.doe+x@mail.example.org.", "About Project FALCON"]
    assert prompt(make(REDACT), *texts) == ["Pay with [card], please", "I am [mail].", "About the project"]


def test_prompts_without_a_match_are_the_same_list(make: Make) -> None:
    async def ask() -> None:
        texts = ["Call 555 1234", "not@mail", "x" * 30_000]
        assert await make(REDACT).prompt(texts, "t") is texts

    run(ask())


def test_a_refusal_names_the_hook_and_never_the_text(make: Make) -> None:
    with pytest.raises(Refused) as caught:
        prompt(make(REFUSE), "fine", "the falcon flies")
    error = caught.value
    assert "'no-falcon'" in error.message
    assert "falcon flies" not in error.message
    assert (error.http_status, error.grpc_status, error.openai_type, error.reason) == (
        400,
        "INVALID_ARGUMENT",
        "content_filter",
        "moderation",
    )


def test_each_hook_sees_what_the_one_before_it_left(make: Make) -> None:
    rename = {"name": "a", "action": "redact", "patterns": [{"literal": "falcon", "replacement": "sparrow"}]}
    assert prompt(make(rename, REFUSE), "a falcon") == ["a sparrow"]
    with pytest.raises(Refused):
        prompt(make(REFUSE, rename), "a falcon")


def test_of_overlapping_matches_the_first_and_of_equal_starts_the_pattern_that_stands_first_counts(make: Make) -> None:
    patterns = [{"literal": t, "replacement": f"<{t}>"} for t in ("bc", "ab", "abc")]
    assert prompt(make({"name": "a", "action": "redact", "patterns": patterns}), "abc bcabc") == ["<ab>c <bc><ab>c"]


def test_a_replacement_may_keep_groups(make: Make) -> None:
    keep = {"regex": r"\d{4}-\d{4}-(?P<last>\d{4})", "replacement": r"****-\g<last>"}
    assert prompt(make({"name": "a", "action": "redact", "patterns": [keep]}), "1111-2222-3333!") == ["****-3333!"]


def test_hooks_hold_for_the_tenants_and_sides_they_name(make: Make) -> None:
    moderation = make({**REFUSE, "tenants": ["a", "b"], "on": ["prompt"]})
    assert moderation.looks_at("prompt", "a")
    assert not moderation.looks_at("prompt", "c")
    assert not moderation.looks_at("answer", "a")
    assert moderation.answer("a") is None
    assert prompt(moderation, "falcon", tenant="c") == ["falcon"]
    with pytest.raises(Refused):
        prompt(moderation, "falcon", tenant="b")


@pytest.mark.parametrize("text", ["a" * 60 + "?!", "a" * 60 + "?!" + "b" * 30_000], ids=["short", "long"])
def test_a_catastrophic_pattern_refuses_in_time_or_is_left_out(make: Make, text: str) -> None:
    hook = {"name": "slow", "action": "redact", "patterns": [CATASTROPHIC, CARD], "timeout_s": 0.05}
    started = time.monotonic()
    with pytest.raises(Refused, match="'slow' could not look at this prompt in time"):
        prompt(make(hook), text)
    assert prompt(make({**hook, "on_error": "allow"}), f"{text} 4111111111111111") == [f"{text} [card]"]
    assert time.monotonic() - started < 5


def test_many_texts_that_are_slow_to_look_at_take_no_longer_than_one(make: Make) -> None:
    hook = {"name": "slow", "action": "redact", "patterns": [CATASTROPHIC, CARD], "timeout_s": 0.05}
    texts = ["a" * 60 + "?!"] * 300
    started = time.monotonic()
    assert prompt(make({**hook, "on_error": "allow"}), *texts, "4111111111111111") == [*texts, "[card]"]
    assert time.monotonic() - started < 5  # 15 s if each took its time


def test_a_catastrophic_pattern_does_not_hang_a_stream(make: Make) -> None:
    hook = {"name": "slow", "action": "redact", "patterns": [CATASTROPHIC, CARD], "timeout_s": 0.05}
    pieces = ["a" * 50, "a?", " 4111111111111111 ", "end"]
    started = time.monotonic()
    assert isinstance(answer(make(hook), *pieces)[1], Refused)
    passed, error = answer(make({**hook, "on_error": "allow"}), *pieces)
    assert error is None
    assert "".join(passed) == "a" * 51 + "? [card] end"
    assert time.monotonic() - started < 5


def test_verdicts_are_counted_by_hook(make: Make) -> None:
    seen: list[tuple[str, str, str]] = []
    moderation = make(REDACT, REFUSE, on_verdict=lambda *verdict: seen.append(verdict))
    with pytest.raises(Refused):
        prompt(moderation, "a@b.example and a falcon")
    answer(moderation, "a@b.example ", "c@d.example ", "end")
    assert seen == [
        ("privacy", "prompt", "redacted"),
        ("no-falcon", "prompt", "refused"),
        ("privacy", "answer", "redacted"),
    ]


# Patterns on answers


def test_text_that_can_not_become_a_match_passes_at_once(make: Make) -> None:
    words = ["The quick", ", brown; ", "(fox) - ", "over. "]
    hook = {"name": "a", "action": "redact", "patterns": [CARD, CODE_NAME]}
    passed, _ = answer(make(hook), *words)
    assert passed == [*words, ""]


def test_what_could_become_a_match_waits_until_it_can_not(make: Make) -> None:
    hook = {"name": "a", "action": "redact", "patterns": [CODE_NAME]}
    assert answer(make(hook), "a proj", "ect ", "falc", "ade")[0] == ["a ", "", "", "project falcade", ""]
    assert answer(make(hook), "a proj", "ect ", "falc", "on!")[0] == ["a ", "", "", "the project!", ""]
    assert answer(make(hook), "a proj", "ect ")[0] == ["a ", "", "project "]


def test_no_more_than_the_hold_back_is_ever_held(make: Make) -> None:
    hook = {"name": "a", "action": "redact", "patterns": [{"regex": "a.*b"}], "holdback_chars": 10}

    async def read() -> None:
        reader = make(hook).answer("t")
        assert reader is not None
        out = ""
        for fed in range(1, 200):
            out += await reader.feed("a")
            assert fed - len(out) <= 10

    run(read())


def test_a_match_longer_than_the_hold_back_is_still_taken_out_where_its_window_matches(make: Make) -> None:
    hook = {"name": "a", "action": "redact", "patterns": [{"regex": r"\d+", "replacement": "#"}], "holdback_chars": 8}
    passed, _ = answer(make(hook), *"x" + "7" * 100 + "y")
    assert set("".join(passed)) == {"x", "#", "y"}


def test_a_refusal_comes_after_the_text_in_front_of_it(make: Make) -> None:
    passed, error = answer(make(REFUSE), "Once a fal", "con ", "flew")
    assert "".join(passed) == "Once a "
    assert isinstance(error, Refused)
    passed, error = answer(make(REFUSE), "Once a falcon")
    assert "".join(passed) == "Once a "
    assert isinstance(error, Refused)
    later = {"name": "end", "action": "refuse", "patterns": [{"regex": r"stop$"}]}
    passed, error = answer(make(later), "Now stop")
    assert passed == ["Now ", ""]
    assert isinstance(error, Refused)


PATTERNS = [
    r"\b(?:\d[ -]?){4,6}\b",
    "foobar|foo",
    "foo|foobar",
    r"[ab.]+@[ab]+\.[ab]{2,}",
    r"\d{3}$",
    "(?<=x)a+",
    "(?<!b)o+(?!b)",
    "a.{0,4}b",
    "a.{0,4}?b",
    r"(\w)\1",
    r"(?i)Fo\B",
    "(?>a*)b?x",
    "^a+",
    "(?m)^b|a$",
    r"[[:digit:]$\b]+-",
    "a(?=b|$)",
    r"\mfo",
    r"b\M",
    r"(?P<n>a)(?P=n)+b",
]
HOOKS = [
    *({"name": "one", "action": "redact", "patterns": [{"regex": p, "replacement": "#"}]} for p in PATTERNS),
    {
        "name": "all",
        "action": "redact",
        "patterns": [{"regex": p, "replacement": f"<{i}>"} for i, p in enumerate(PATTERNS)],
    },
    {"name": "stop", "action": "refuse", "patterns": [{"regex": p} for p in PATTERNS[:4]]},
]


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.integers(0, len(HOOKS) - 1),
    text=st.text("abfox01 -.@\n", max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=12),
)
def test_an_answer_passes_alike_however_it_was_cut(make: Make, which: int, text: str, cuts: list[int]) -> None:
    moderation = make(HOOKS[which])
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    whole, whole_error = answer(moderation, text)
    cut, cut_error = answer(moderation, *pieces)
    single, single_error = answer(moderation, *text)
    assert "".join(whole) == "".join(cut) == "".join(single)
    assert type(whole_error) is type(cut_error) is type(single_error)
    if whole_error is None:
        assert ["".join(whole)] == prompt(moderation, text)
    else:
        with pytest.raises(Refused):
            prompt(moderation, text)


BOUNDED = [p for p in PATTERNS if "+" not in p and "*" not in p]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.lists(st.sampled_from(BOUNDED), min_size=1, max_size=4),
    text=st.lists(st.text("abfox01 -\n", max_size=60), min_size=4, max_size=4).map("".join),
    cuts=st.lists(st.integers(0, 240), max_size=30),
)
def test_an_answer_much_longer_than_the_hold_back_passes_alike_too(
    make: Make, which: list[str], text: str, cuts: list[int]
) -> None:
    patterns = [{"regex": p, "replacement": f"<{i}>"} for i, p in enumerate(which)]
    moderation = make({"name": "all", "action": "redact", "patterns": patterns, "holdback_chars": 16})
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    expected = prompt(moderation, text)
    for pieces in ([text], [text[a:b] for a, b in itertools.pairwise(edges)], list(text)):
        assert ["".join(answer(moderation, *pieces)[0])] == expected


# Endpoint


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Endpoint("attack")
    with server.up():
        yield server


def at(endpoint: Endpoint, path: str = "/ok", **fields: Any) -> dict[str, Any]:
    return {"name": "vendor", "endpoint": {"url": endpoint.url(path), **fields}}


def test_an_endpoint_is_asked_once_for_all_texts_of_a_prompt(make: Make, endpoint: Endpoint, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    hook = at(endpoint, model="omni", api_key_file=str(key))
    assert prompt(make(hook), "hello", "", "there", "hello") == ["hello", "", "there", "hello"]
    assert endpoint.asked == [{"input": ["hello", "there"], "model": "omni"}]
    assert endpoint.keys == ["Bearer secret"]


def test_a_flagged_prompt_is_refused(make: Make, endpoint: Endpoint) -> None:
    with pytest.raises(Refused, match="'vendor' does not let this prompt pass"):
        prompt(make(at(endpoint)), "hello", "attack them")


def test_many_texts_are_asked_for_in_batches(make: Make, endpoint: Endpoint) -> None:
    texts = [f"text {i}" for i in range(100)]
    assert prompt(make(at(endpoint)), *texts) == texts
    assert sorted(len(body["input"]) for body in endpoint.asked) == [4, 32, 32, 32]
    with pytest.raises(Refused):
        prompt(make(at(endpoint)), *texts, "attack")


FAILURES = ["/slow", "/broken", "/elsewhere", "/short", "/odd", "/list", "/garbage"]


@pytest.mark.parametrize("path", FAILURES)
def test_an_endpoint_that_fails_answers_503_or_lets_pass_as_it_was_told(
    make: Make, endpoint: Endpoint, path: str
) -> None:
    with pytest.raises(Unavailable, match="'vendor' can't look at this prompt now") as caught:
        prompt(make(at(endpoint, path, timeout_s=0.2)), "attack")
    assert caught.value.reason == "moderation"
    assert caught.value.retry_after_s
    assert prompt(make(at(endpoint, path, timeout_s=0.2, on_error="allow")), "attack") == ["attack"]
    assert isinstance(answer(make(at(endpoint, path, timeout_s=0.2)), "an attack")[1], Unavailable)
    assert answer(make(at(endpoint, path, timeout_s=0.2, on_error="allow")), "an attack") == (["", "an attack"], None)


def test_an_endpoint_that_is_not_there_fails_too(make: Make, endpoint: Endpoint) -> None:
    hook = {"name": "vendor", "endpoint": {"url": "http://127.0.0.1:9/v1/moderations"}}
    with pytest.raises(Unavailable):
        prompt(make(hook), "x")
    assert prompt(make({"name": "v", "endpoint": {**hook["endpoint"], "on_error": "allow"}}), "x") == ["x"]  # type: ignore[dict-item]


def test_an_answer_passes_in_windows_that_the_endpoint_has_seen(make: Make, endpoint: Endpoint) -> None:
    text = "All is well here, and it goes on like this. " * 6
    passed, error = answer(make({**at(endpoint), "window_chars": 80}), *text)
    assert error is None
    assert "".join(passed) == text
    assert 70 < max(map(len, passed)) <= 80
    assert len(endpoint.asked) == sum(1 for p in passed if p)


def test_an_answer_ends_before_the_window_that_was_flagged(make: Make, endpoint: Endpoint) -> None:
    text = "All is well here, so far. " * 5 + "Now att"
    pieces = [*text, "ack!", " and more text that never passes"]
    passed, error = answer(make({**at(endpoint), "window_chars": 40}), *pieces)
    assert isinstance(error, Refused)
    assert text.startswith("".join(passed))
    assert len("".join(passed)) >= 80
    whole, error = answer(make({**at(endpoint), "window_chars": 40}), "".join(pieces))
    assert isinstance(error, Refused)
    assert "".join(whole) == "".join(passed)


def test_an_endpoint_sees_what_lies_across_two_windows(make: Make, endpoint: Endpoint) -> None:
    text = "x" * 37 + "attack" + "y" * 60  # no white space: the window ends within the word
    passed, error = answer(make({**at(endpoint), "window_chars": 40}), text)
    assert isinstance(error, Refused)
    assert "".join(passed) == text[:40]


def test_a_redaction_comes_before_the_endpoint_is_asked(make: Make, endpoint: Endpoint) -> None:
    passed, _ = answer(make(REDACT, at(endpoint)), "write to a@b.exam", "ple now")
    assert "".join(passed) == "write to [mail] now"
    assert endpoint.asked == [{"input": ["write to [mail] now"]}]


# Entry point


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "moderation_hooks_of_a_test"
    (tmp_path / f"{name}.py").write_text(
        textwrap.dedent(
            """
            import asyncio, sys, threading, time
            from kserve_vllm.policy.moderation.hooks import Refusal

            def upper(text, where, tenant):
                return f"{where}:{tenant}:{text.upper()}" if "loud" in text else None

            def threaded(text, where, tenant):
                return threading.current_thread().name

            async def waits(text, where, tenant):
                await asyncio.sleep(0.01)
                if "bad" in text:
                    raise Refusal
                return None

            def returns(text, where, tenant):
                return Refusal("secret detail") if "bad" in text else None

            def breaks(text, where, tenant):
                raise KeyError(text)

            def odd(text, where, tenant):
                return 1

            def leaves(text, where, tenant):
                sys.exit(3)

            async def leaves_the_loop(text, where, tenant):
                sys.exit(3)

            async def waits_long(text, where, tenant):
                await asyncio.sleep(60)

            def cancels(text, where, tenant):
                raise asyncio.CancelledError

            async def cancels_in_the_loop(text, where, tenant):
                raise asyncio.CancelledError

            async def cancels_itself(text, where, tenant):
                asyncio.current_task().cancel()
                await asyncio.sleep(60)

            def sleeps(text, where, tenant):
                time.sleep(0.5)

            def hands_on(text, where, tenant):
                return waits(text, where, tenant)

            class Nested:
                @staticmethod
                def call(text, where, tenant):
                    return None

            number = 1
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def test_an_entry_point_may_replace_a_text(make: Make, module: str) -> None:
    hook = {"name": "ours", "entry_point": f"{module}:upper"}
    assert prompt(make(hook), "quiet", "loud", tenant="a") == ["quiet", "prompt:a:LOUD"]
    assert "".join(answer(make(hook), "lo", "ud", tenant="b")[0]) == "answer:b:LOUD"


def test_an_entry_point_that_is_no_coroutine_runs_in_a_thread(make: Make, module: str) -> None:
    (name,) = prompt(make({"name": "ours", "entry_point": f"{module}:threaded"}), "x")
    assert name.startswith("moderation-ours")


@pytest.mark.parametrize("function", ["waits", "returns", "hands_on"])
def test_an_entry_point_may_refuse(make: Make, module: str, function: str) -> None:
    hook = {"name": "ours", "entry_point": f"{module}:{function}", "window_chars": 16}
    assert prompt(make(hook), "good", "fine") == ["good", "fine"]
    with pytest.raises(Refused) as caught:
        prompt(make(hook), "good", "bad", "fine")
    assert caught.value.message == "the moderation hook 'ours' does not let this prompt pass"
    passed, error = answer(make(hook), *"this is good, but that is bad. ", "more")
    assert isinstance(error, Refused)
    assert "".join(passed) == "this is good, but that is "


@pytest.mark.parametrize(
    "function",
    ["breaks", "odd", "sleeps", "leaves", "leaves_the_loop", "cancels", "cancels_in_the_loop", "cancels_itself"],
)
def test_an_entry_point_that_fails_answers_503_or_lets_pass_as_it_was_told(
    make: Make, module: str, function: str, caplog: pytest.LogCaptureFixture
) -> None:
    hook = {"name": "ours", "entry_point": f"{module}:{function}", "timeout_s": 0.1}
    with pytest.raises(Unavailable):
        prompt(make(hook), "a private text")
    started = time.monotonic()
    assert prompt(make({**hook, "on_error": "allow"}), *["a private text"] * 50) == ["a private text"] * 50
    assert time.monotonic() - started < 2
    assert "ours" in caplog.text
    assert "a private text" not in caplog.text


def test_a_client_that_leaves_while_an_entry_point_looks_is_no_failure_of_the_hook(make: Make, module: str) -> None:
    seen: list[tuple[str, ...]] = []

    async def leave() -> None:
        hook = {"name": "ours", "entry_point": f"{module}:waits_long"}
        asking = asyncio.ensure_future(make(hook, on_verdict=lambda *v: seen.append(v)).prompt(["x"], "t"))
        await asyncio.sleep(0.1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    run(leave())
    assert seen == []


@pytest.mark.slow
def test_a_call_that_never_comes_back_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("import time\ndef call(*_): time.sleep(600)\n")
    (tmp_path / "m.yaml").write_text("hooks: [{name: ours, entry_point: 'hangs:call', timeout_s: 0.1}]")
    code = """
        import asyncio
        from kserve_vllm.core.errors import Unavailable
        from kserve_vllm.policy.moderation.hooks import Moderation
        moderation = Moderation("m.yaml")
        for _ in range(20):  # more than there are threads
            try:
                asyncio.run(moderation.prompt(["x"], "t"))
            except Unavailable:
                print("refused")
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=env,
        timeout=60,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["refused"] * 20


# The file


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ([], "the file: hooks: List should have at least 1 item"),
        ([{"name": "a"}], "hook 'a': a hook has one of `patterns`, `endpoint` and `entry_point`"),
        ([{"patterns": [MAIL], "action": "refuse"}], "hook 1: name: Field required"),
        ([{**REDACT, "colour": 1}], "hook 'privacy': colour: no such field"),
        ([{**REDACT, "patterns": [{"regx": "a"}]}], "hook 'privacy': patterns.1.regx: no such field"),
        ([{**REDACT, "patterns": [{"regex": "("}]}], "hook 'privacy', pattern 1: missing )"),
        ([{**REDACT, "patterns": [MAIL, {"regex": "a*"}]}], "hook 'privacy', pattern 2: it matches the empty text"),
        ([{**REDACT, "patterns": [{"regex": "a", "literal": "b"}]}], "either `regex` or `literal`"),
        ([{**REDACT, "patterns": [{"regex": "(?x)a b"}]}], "the flags x,"),
        ([{**REDACT, "patterns": [{"regex": "(?:abc){e<=1}"}]}], "fuzzy matching can't be used here"),
        ([{**REDACT, "patterns": [{"regex": "a", "replacement": r"\1"}]}], "the replacement names the group 1"),
        ([{**REFUSE, "patterns": [MAIL]}], "`replacement` does nothing with `action: refuse`"),
        ([{"name": "a", "patterns": [{"literal": "x"}]}], "needs `action: refuse` or `action: redact`"),
        ([REDACT, REDACT], "two hooks have the name 'privacy'"),
        ([{**REDACT, "on": ["prompts"]}], "hook 'privacy': on.1: Input should be 'prompt' or 'answer'"),
        ([{**REDACT, "window_chars": 100}], "`window_chars` does nothing for a hook with `patterns`"),
        ([{"name": "a", "endpoint": {"url": "ftp://x"}}], "hook 'a': endpoint.url: String should match"),
        ([{"name": "a", "endpoint": {"url": "http://x"}, "timeout_s": 1}], "it belongs below `endpoint`"),
        ([{"name": "a", "endpoint": {"url": "http://x", "api_key_file": "/no/such"}}], "api_key_file can't be used"),
        ([{"name": "a", "entry_point": "no_such_module:f"}], "no_such_module:f can't be loaded: ModuleNotFoundError"),
        ([{"name": "a", "entry_point": "json:dump.no"}], "json:dump.no can't be loaded: AttributeError"),
        ([{"name": "a", "entry_point": "json:__name__"}], "json:__name__ can't be called"),
    ],
)
def test_a_file_that_can_not_be_used_says_what_is_wrong(make: Make, hooks: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(*hooks)
    assert message in str(caught.value)
    assert "moderation.yaml (--moderation-file)" in str(caught.value)


@pytest.mark.parametrize("content", ["hooks: [", "", "- a", "hooks: {}", "\x00"])
def test_a_file_that_is_no_list_of_hooks_is_a_config_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        Moderation(path)
    with pytest.raises(ConfigError, match="can't be read"):
        Moderation(tmp_path / "none.yaml")


def test_on_is_a_word_in_the_file_and_may_be_a_single_one(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("hooks: [{name: a, on: prompt, action: refuse, patterns: [{literal: x, ignore_case: true}]}]")
    moderation = Moderation(path)
    assert moderation.looks_at("prompt", "t")
    assert not moderation.looks_at("answer", "t")
