"""Everything that a diagnosis looks at, at one moment, as plain JSON: taken once, kept in a file, judged anywhere."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

import yaml

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.cluster import Json

_SECRET_NAME = re.compile(r"(token|secret|password|passwd|api_?key|credential)s?$", re.IGNORECASE)
_SECRET_FLAG = re.compile(r"^--?[\w.-]*(token|secret|password|api[-_]key)$", re.IGNORECASE)
_TOKEN = re.compile(
    r"hf_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,}|sk-[A-Za-z0-9_-]{16,}|ey[A-Za-z0-9_-]{10,}\.ey[\w.-]{10,}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?i:(?<=bearer )\S+)"
)
_HIDDEN = "(hidden)"
_NOISE = ("kubectl.kubernetes.io/last-applied-configuration", "deployment.kubernetes.io/revision-history")


@dataclass
class Snapshot:
    """What was read of one service.

    Attributes:
        name, namespace: of the InferenceService, or a URL and "" where one server was asked.
        taken_at: RFC 3339, in UTC.
        objects: by kind, as the API server gave them, less secrets and bookkeeping.
        refused: what could not be read, to `{"status": HTTP status or 0, "message": ...}`.
        logs: by `pod/container`, and `pod/container/previous` for the run before a restart.
        answers: by pod or URL: `health`, `live` (each `{"status", "body"}`) and `metrics` (text).
        submitted: what the API server said of a manifest that was tried without keeping it; empty where it took it.
    """

    name: str
    namespace: str
    taken_at: str
    objects: dict[str, list[Json]] = field(default_factory=dict)
    refused: dict[str, Json] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    answers: dict[str, Json] = field(default_factory=dict)
    submitted: str = ""

    @property
    def now(self) -> datetime:
        """When it was taken."""
        return moment(self.taken_at) or datetime.now(UTC)

    def save(self, path: Path) -> None:
        """Write it as JSON, for a colleague or a bug report. Secrets were hidden when it was taken."""
        path.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n", "utf-8")


def read(path: Path) -> Snapshot:
    """A snapshot that `save` wrote, or its like in YAML.

    Raises:
        ConfigError: the file is none.
    """
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no snapshot of `kserve-vllm diagnose --save`: {error}") from error
    wrong = "it is no object"
    if isinstance(body, dict):
        kinds = {each.name: str if each.type == "str" else dict for each in fields(Snapshot)}
        wrong = next((f"{name!r} is no field of one" for name in body if name not in kinds), "")
        wrong = wrong or next(
            (f"no {name!r} in it" for name in ("name", "namespace", "taken_at") if name not in body), ""
        )
        wrong = wrong or next(
            (f"{name!r} has another kind of value" for name in body if not _is(body[name], kinds[name])), ""
        )
    if wrong:
        raise ConfigError(f"{path} is no snapshot of `kserve-vllm diagnose --save`: {wrong}")
    return Snapshot(**body)


def _is(value: object, kind: type) -> bool:
    # YAML reads a time without quotes as one.
    return isinstance(value, kind) or (kind is str and isinstance(value, datetime))


def moment(text: str | None) -> datetime | None:
    """A Kubernetes timestamp, with or without a fraction."""
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
    except ValueError:
        return None


def without_secrets(obj: Json) -> Json:
    """A copy with the values of secret-looking variables and flags hidden, and without managed fields."""
    copied = copy.deepcopy(obj)
    metadata = copied.get("metadata") or {}
    metadata.pop("managedFields", None)
    for name in _NOISE:
        (metadata.get("annotations") or {}).pop(name, None)
    _hide(copied)
    return copied


def hide_in_text(text: str) -> str:
    """Text with what looks like a token hidden."""
    return _TOKEN.sub(_HIDDEN, text)


def _hide(node: object) -> None:
    if isinstance(node, dict):
        name = node.get("name")
        if isinstance(name, str) and isinstance(node.get("value"), str) and _SECRET_NAME.search(name):
            node["value"] = _HIDDEN
        for key in ("args", "command"):
            if isinstance(node.get(key), list):
                node[key] = _hidden_words(node[key])
        for key, value in node.items():
            if isinstance(value, str):
                node[key] = hide_in_text(value)
            else:
                _hide(value)
    elif isinstance(node, list):
        for at, item in enumerate(node):
            if isinstance(item, str):
                node[at] = hide_in_text(item)
            else:
                _hide(item)


def _hidden_words(words: list[object]) -> list[object]:
    out: list[object] = []
    for word in words:
        flag, equals, _ = str(word).partition("=")
        if equals and _SECRET_FLAG.match(flag):
            out.append(f"{flag}={_HIDDEN}")
        elif out and _SECRET_FLAG.match(str(out[-1])) and not str(word).startswith("-"):
            out.append(_HIDDEN)
        else:
            out.append(word)
    return out
