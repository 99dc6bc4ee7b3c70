"""A row of the table of causes, and the three ways to write one: said, logged, found."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Template

from kserve_vllm.ops.diagnose.facts import Facts

# How bad: `fault` keeps the service from working, `degraded` harms some requests, `risk` will harm some day.
FAULT, DEGRADED, RISK = "fault", "degraded", "risk"
_EVIDENCE_CHARACTERS = 400
Match = Mapping[str, str]


@dataclass(frozen=True)
class Finding:
    """A cause that applies.

    Attributes:
        cause: the row.
        why: what is wrong here and why, in words.
        mend: commands, or comments that begin with `#`, one a line.
        evidence: what it was seen by.
    """

    cause: Cause
    why: str
    mend: tuple[str, ...]
    evidence: str


@dataclass(frozen=True)
class Cause:
    """One thing that goes wrong.

    Attributes:
        id: a name that stays, for scripts.
        title: what is wrong, in a few words.
        rank: 0 to 100; higher is nearer to the root and is told first.
        why: a sentence with `$name`, `$ns` and what `find` gives.
        mend: commands, likewise.
        find: the values for the sentences and, as `evidence`, what was seen; None where the cause does not apply.
        severity: `fault`, `degraded` or `risk`.
        explains: causes that follow from this one and need not be told beside it.
        last_resort: told only where no other fault is found.
    """

    id: str
    title: str
    rank: int
    why: str
    mend: tuple[str, ...]
    find: Callable[[Facts], Match | None]
    severity: str = FAULT
    explains: tuple[str, ...] = ()
    last_resort: bool = False

    def look(self, facts: Facts) -> Finding | None:
        """The finding, where the cause applies."""
        match = self.find(facts)
        if match is None:
            return None
        names = {"name": facts.name, "ns": facts.namespace, **match}
        return Finding(
            self,
            Template(self.why).safe_substitute(names),
            tuple(Template(line).safe_substitute(names) for line in self.mend),
            match.get("evidence", "")[:_EVIDENCE_CHARACTERS],
        )


def said(
    pattern: str, *kinds: str, container: str = "", when: Callable[[Facts], bool] = lambda f: True
) -> Callable[[Facts], Match | None]:
    """Looks for a pattern in `REASON MESSAGE` of conditions, container states and events.

    Args:
        pattern: a regular expression; its named groups go into the sentences.
        kinds: of the objects to look at; all where none is given.
        container: the name of a container that it has to be about.
        when: has to hold too.
    """
    compiled = re.compile(pattern, re.DOTALL)

    def find(facts: Facts) -> Match | None:
        if not when(facts):
            return None
        for each in facts.said:
            if (kinds and each.kind not in kinds) or (container and each.container != container):
                continue
            if match := compiled.search(f"{each.reason} {each.text}"):
                groups = {key: value or "" for key, value in match.groupdict().items()}
                at = {"pod": each.name, "where": each.where, "container": each.container or "kserve-container"}
                return {**at, **groups, "evidence": f"{each.where}: {each.reason} {each.text}".strip()}
        return None

    return find


def logged(
    pattern: str, container: str = "", when: Callable[[Facts], bool] = lambda f: True
) -> Callable[[Facts], Match | None]:
    """Looks for a pattern in the log lines, and in the termination messages, of containers that are not well."""
    compiled = re.compile(pattern, re.DOTALL)

    def find(facts: Facts) -> Match | None:
        if not when(facts):
            return None
        texts = [(line.pod, line.container, line.text) for line in facts.lines]
        texts += [(each.name, each.container, each.text) for each in facts.said if each.kind == "Pod"]
        texts += [
            (facts.name, "kserve-container", each.text) for each in facts.said if each.reason == "ModelLoadFailed"
        ]
        for pod, where, text in texts:
            if container and where != container:
                continue
            if match := compiled.search(text):
                groups = {key: value or "" for key, value in match.groupdict().items()}
                start = max(0, match.start() - 120)
                seen = f"log of {pod}/{where}: {text[start : start + 360].strip()}"
                return {"pod": pod, "container": where, **groups, "evidence": seen}
        return None

    return find


def either(*finders: Callable[[Facts], Match | None]) -> Callable[[Facts], Match | None]:
    """The first of several ways that finds something."""

    def find(facts: Facts) -> Match | None:
        return next((match for finder in finders if (match := finder(facts)) is not None), None)

    return find
