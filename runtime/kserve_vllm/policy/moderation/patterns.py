"""A list of patterns over a text that may still grow.

The module `regex` is used, not `re`: it can give up after a time, and it can say whether more text would have changed
what it found. vLLM depends on it, so it is there anyway.

How a growing text is read. A position is open while a match that begins there could depend on text that has not come
yet, and it is at most the hold-back away from the text's end. Everything before the first open position is decided and
passes at once, with its matches replaced. So a match is found wherever the text was cut, as long as it, with what it
looks at behind its end, is no longer than the hold-back; and what passes does not depend on the cuts.

Whether a position is open is asked with a second pattern: the first one followed by what never matches. Searched for
with `partial=True`, it is found only where some way of matching ran into the text's end. `partial=True` on the pattern
itself would not do: it takes a shorter match over a longer one that is still incomplete. Anchors that look at the next
character (`\\b`, `$` and so on) do not run into the end by themselves and are spelled as lookaheads there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import regex

MAX_CONTEXT = 64
"""Characters in front of a position that a pattern can look back at, at least, in a growing text."""

_ANCHORS = {
    r"\b": r"(?:(?<=\w)(?!\w)|(?<!\w)(?=\w))",
    r"\B": r"(?:(?<=\w)(?=\w)|(?<!\w)(?!\w))",
    r"\m": r"(?<!\w)(?=\w)",
    r"\M": r"(?<=\w)(?!\w)",
    r"\Z": r"(?![\s\S])",
    r"\z": r"(?![\s\S])",
    "$": r"(?=\n?(?![\s\S])|\n)",
}
_CLASS_START = regex.compile(r"\[\^?\]?")
_POSIX_CLASS = regex.compile(r"\[:\^?\w+:\]")
_LEADING_FLAGS = regex.compile(r"\(\?([a-zA-Z0-9]+)\)")
_REFUSED_SYNTAX = {
    r"\\[GK]": r"\G and \K",
    r"\(\?#": "comments",
    r"\(\?-?[a-zV01]*[xwrbepLV]": "the flags x, w, r, b, e, p, L and V1",
    r"\{[^{}]*[a-z][^{}]*<": "fuzzy matching",
}
_HAS_REFERENCES = regex.compile(r"\\[1-9]|\\g<|\(\?P[=<>]|\(\?[R0-9&(|]|\(\?<[A-Za-z_]|\(\?[a-z]+\)")
_REFERENCE = regex.compile(r"\\(?:g<(\w+)>|([0-9]))")


class PatternError(ValueError):
    """A pattern or its replacement can't be used; the message says why."""


class Rule:
    """One pattern and what takes the place of its matches.

    Args:
        source: the pattern, in the syntax of the module `regex`, version 0.
        replacement: text; `\\1` and `\\g<name>` stand for groups.
        ignore_case: whether case makes no difference.

    Raises:
        PatternError: the pattern does not compile, matches nothing at all, or uses what a growing text can't have.
    """

    def __init__(self, source: str, replacement: str, ignore_case: bool = False) -> None:
        for syntax, name in _REFUSED_SYNTAX.items():
            if regex.search(syntax, source):
                raise PatternError(f"{name} can't be used here")
        leading = _LEADING_FLAGS.match(source)
        flags = set(leading[1]) if leading else set()
        core = source[leading.end() :] if leading else source
        if ignore_case:
            flags.add("i")
        head = f"(?{''.join(sorted(flags))})" if flags else ""
        try:
            self.full = regex.compile(head + core)
            self.probe = regex.compile(f"{head}(?:{_spell_anchors(core)})(?!)")
        except regex.error as error:
            raise PatternError(str(error)) from error
        if self.full.fullmatch("") is not None:
            raise PatternError("it matches the empty text")
        for name, number in _REFERENCE.findall(replacement):
            group = _group(name or number)
            if group not in self.full.groupindex and not (isinstance(group, int) and group <= self.full.groups):
                raise PatternError(f"the replacement names the group {group}, and the pattern has none such")
        self._replacement = replacement
        self._literal = not _REFERENCE.search(replacement)
        scoped = f"(?{''.join(sorted(flags))}:" if flags else "(?:"
        alone = bool(flags - set("ims")) or _HAS_REFERENCES.search(core) is not None
        self.part: str | None = None if alone else f"{scoped}{core})"
        """The pattern as a branch of a larger one, or None where it can't be."""
        self.probe_part: str | None = None if alone else f"{scoped}{_spell_anchors(core)})"

    def replace(self, match: regex.Match[str]) -> str:
        """What takes the place of a match."""
        if self._literal:
            return self._replacement
        return str(_REFERENCE.sub(lambda r: match[_group(r[1] or r[2])] or "", self._replacement))


class Patterns:
    """Patterns that are looked for together.

    Where matches overlap, the one that begins first counts, and of those the pattern that stands first.

    Args:
        rules: the patterns.
        holdback: characters of a growing text that are held back at most.
        timeout_s: how long a look at some texts, or at one addition to a growing text, may take, in seconds of
            processor time, for every 20,000 characters that were begun.
    """

    def __init__(self, rules: Sequence[Rule], holdback: int, timeout_s: float) -> None:
        self.rules = tuple(rules)
        self.holdback = holdback
        self.timeout_s = timeout_s
        parts = [(rule.part, rule.probe_part) for rule in rules if rule.part is not None]
        lone = [rule for rule in rules if rule.part is None]
        self.gates = [rule.full for rule in lone]
        self.probes = [rule.probe for rule in lone]
        if parts:
            self.gates.append(regex.compile("|".join(str(part) for part, _ in parts)))
            self.probes.append(regex.compile(f"(?:{'|'.join(str(part) for _, part in parts)})(?!)"))

    def budget(self, characters: int) -> float:
        """How long a look at so many characters may take, in seconds."""
        return self.timeout_s * (1 + characters // 20_000)


class Reading:
    """One text, whole or growing, read with some patterns.

    Args:
        patterns: what is looked for.
        stop: whether the first match ends the reading.
        skip_slow: whether a pattern that takes too long is left out from then on; else `TimeoutError` is raised.
        concurrent: whether other threads may run meanwhile; worth it from some ten thousand characters on.

    Attributes:
        stopped: whether a match ended the reading.
        replaced: whether a match was replaced.
        slow: whether a pattern took too long.
    """

    __slots__ = (
        "_concurrent",
        "_deadline",
        "_gates",
        "_patterns",
        "_pos",
        "_probes",
        "_rules",
        "_size",
        "_skip_slow",
        "_stop",
        "_text",
        "replaced",
        "slow",
        "stopped",
    )

    def __init__(self, patterns: Patterns, stop: bool, skip_slow: bool, concurrent: bool = False) -> None:
        self._patterns = patterns
        self._rules = patterns.rules
        self._gates, self._probes = patterns.gates, patterns.probes
        self._stop = stop
        self._skip_slow = skip_slow
        self._concurrent = concurrent
        self._text = ""
        self._pos = 0
        self._deadline = 0.0
        self._size = 0
        self.stopped = self.replaced = self.slow = False

    def whole(self, texts: Sequence[str]) -> list[str]:
        """Whole texts with their matches replaced; the same objects where there are none.

        Where a match ends the reading, the last text is what stands before it, and those behind it are missing.

        Raises:
            TimeoutError: a pattern took too long, over all texts together.
        """
        # Even a short text costs a call for each pattern, so each counts for some hundred characters.
        self._size = sum(map(len, texts)) + 200 * len(texts)
        self._deadline = time.thread_time() + self._patterns.budget(self._size)
        out = []
        for text in texts:
            out.append(self._whole(text))
            if self.stopped:
                break
        return out

    def _whole(self, text: str) -> str:
        nexts = self._look(text, 0, self._rules)
        if not nexts:
            return text
        out: list[str] = []
        pos = self._replace(text, 0, len(text), nexts, out)
        if not self.stopped:
            out.append(text[pos:])
        return "".join(out)

    def feed(self, addition: str, last: bool = False) -> str:
        """What can pass now that the text has grown.

        Args:
            addition: what comes after all that was fed before.
            last: whether nothing comes after it.

        Returns:
            Text with matches replaced. After `stopped`, nothing.

        Raises:
            TimeoutError: a pattern took too long.
        """
        if self.stopped:
            return ""
        text = self._text + addition
        pos, size = self._pos, len(text)
        self._size = size
        self._deadline = time.thread_time() + self._patterns.budget(size)
        out: list[str] = []
        limit = size if last else self._decided(text, pos)
        if size - pos > 256 or self._any(text, pos):
            nexts = self._look(text, pos, self._rules)
            while nexts:
                before = pos
                pos = self._replace(text, pos, limit, nexts, out)
                if self.stopped or last or pos == before or pos <= limit:
                    break
                limit = max(pos, self._decided(text, pos))
        if not self.stopped and pos < limit:
            out.append(text[pos:limit])
            pos = limit
        keep = max(0, pos - max(MAX_CONTEXT, self._patterns.holdback))
        self._text, self._pos = text[keep:], pos - keep
        return "".join(out)

    def _decided(self, text: str, pos: int) -> int:
        """The end of what does not depend on text to come."""
        first = size = len(text)
        probes = None
        while probes is not self._probes:  # again, where a slow one was dropped
            probes = self._probes
            for probe in probes:
                match = self._search(probe, text, pos, partial=True)
                if match is not None and match.start() < first:
                    first = match.start()
        return max(first, size - self._patterns.holdback)

    def _any(self, text: str, pos: int) -> bool:
        """Whether there may be a match. Cheaper than asking each pattern, in a short text."""
        gates = self._gates
        return (
            any(self._search(enforcement, text, pos) is not None for enforcement in gates) or gates is not self._gates
        )

    def _replace(self, text: str, pos: int, limit: int, nexts: dict[Rule, regex.Match[str]], out: list[str]) -> int:
        """Replace matches that begin before `limit`; the position behind the last one."""
        while nexts:
            rule = min(nexts, key=lambda each: nexts[each].start())
            match = nexts[rule]
            if match.start() >= limit:
                break
            out.append(text[pos : match.start()])
            pos = match.end()
            if self._stop:
                self.stopped = True
                return pos
            self.replaced = True
            out.append(rule.replace(match))
            stale = [each for each, found in nexts.items() if found.start() < pos]
            # The order of the patterns decides between two that begin together: kept by putting results in place.
            fresh = self._look(text, pos, stale)
            for each in stale:
                if each in fresh:
                    nexts[each] = fresh[each]
                else:
                    del nexts[each]
        return pos

    def _look(self, text: str, pos: int, rules: Iterable[Rule]) -> dict[Rule, regex.Match[str]]:
        """The next match of each rule that has one."""
        found = {}
        for rule in rules:
            match = self._search(rule.full, text, pos)
            while match is not None and match.end() == match.start():
                match = self._search(rule.full, text, match.end() + 1) if match.end() < len(text) else None
            if match is not None:
                found[rule] = match
        return found

    def _search(
        self, pattern: regex.Pattern[str], text: str, pos: int, partial: bool = False
    ) -> regex.Match[str] | None:
        left = self._deadline - time.thread_time()
        try:
            if left <= 0:
                raise TimeoutError
            return pattern.search(text, pos, partial=partial, timeout=left, concurrent=self._concurrent)
        except TimeoutError:
            self.slow = True
            if not self._skip_slow:
                raise
            self._drop(pattern)
            self._deadline = time.thread_time() + self._patterns.budget(self._size)
            return None

    def _drop(self, pattern: regex.Pattern[str]) -> None:
        """Go on without what took too long: one pattern, or the patterns of a combined one that do so by themselves."""
        alone = [rule for rule in self._rules if pattern in (rule.full, rule.probe)]
        if alone:
            self._rules = tuple(rule for rule in self._rules if rule not in alone)
        # From here on every rule is searched for by itself, so that the next slow one can be told.
        self._gates = [rule.full for rule in self._rules]
        self._probes = [rule.probe for rule in self._rules]


def _group(name: str) -> int | str:
    return int(name) if name.isdigit() else name


def _spell_anchors(core: str) -> str:
    """The pattern with anchors outside of character classes spelled as lookaheads."""
    out = []
    at, in_class = 0, False
    while at < len(core):
        if core[at] == "\\":
            token = core[at : at + 2]
        elif in_class:
            posix = _POSIX_CLASS.match(core, at)
            token = posix[0] if posix else core[at]
            in_class = token != "]"  # noqa: S105
        else:
            opened = _CLASS_START.match(core, at)
            token = opened[0] if opened else core[at]
            in_class = opened is not None
        out.append(token if in_class else _ANCHORS.get(token, token))
        at += len(token)
    return "".join(out)
