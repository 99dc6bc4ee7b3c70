"""How log lines look: one JSON object a line, or readable lines on a terminal.

Every library's lines come out in the same form, also those of vLLM's engine and worker processes, which read the
configuration from a file named in `VLLM_LOGGING_CONFIG_PATH`. Lines that are written while a request is worked on carry
its id and its trace id.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.config
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson
import structlog

from kserve_vllm.core.request_context import current
from kserve_vllm.core.termination import describe

if TYPE_CHECKING:
    from structlog.typing import Processor

Event = MutableMapping[str, object]

_PREFIX = "kserve-vllm-logging-"
_FAILURES = ".failures"
_MILESTONES = ".milestones"
_MOST_FAILURES = 64 << 10


def form(setting: str) -> str:
    """`json` or `console`; `auto` means JSON unless standard error is a terminal."""
    if setting != "auto":
        return setting
    return "console" if sys.stderr.isatty() else "json"


def configure(setting: str = "auto", access_log: bool = False) -> str:
    """Write all lines to standard error in the form of the setting, here and in vLLM's processes. Returns the form.

    Levels: info and above, or what `VLLM_LOGGING_LEVEL` says; warnings and above for kserve. An operator's own
    `VLLM_LOGGING_CONFIG_PATH` stays.
    """
    chosen = form(setting)
    tree = configuration(chosen, os.environ.get("VLLM_LOGGING_LEVEL", "INFO"), access_log)
    logging.config.dictConfig(tree)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.add_log_level,
            add_request,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    if "VLLM_LOGGING_CONFIG_PATH" not in os.environ:
        with tempfile.NamedTemporaryFile("w", prefix=_PREFIX, suffix=".json", delete=False) as file:
            tree["handlers"]["failures"] = {
                "class": "kserve_vllm.telemetry.logs.Failures",
                "level": "ERROR",
                "path": file.name + _FAILURES,
            }
            tree["handlers"]["milestones"] = {
                "class": "kserve_vllm.telemetry.logs.Milestones",
                "level": "INFO",
                "path": file.name + _MILESTONES,
            }
            tree["loggers"]["vllm"]["handlers"] = ["failures", "milestones"]
            json.dump(tree, file)
        os.environ["VLLM_LOGGING_CONFIG_PATH"] = file.name
    return chosen


def forget() -> None:
    """Remove the file that `configure` wrote for vLLM's processes."""
    path = os.environ.get("VLLM_LOGGING_CONFIG_PATH", "")
    if os.path.basename(path).startswith(_PREFIX):
        for each in (path, path + _FAILURES, path + _MILESTONES):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(each)


def failures() -> list[tuple[str, str]]:
    """What vLLM, in any of its processes, has logged as an error with an exception, or of a process that a signal has
    ended: (message, cause in one line), first one first. Nothing where the operator has a logging configuration of
    their own."""
    try:
        with open(os.environ.get("VLLM_LOGGING_CONFIG_PATH", "") + _FAILURES, encoding="utf-8") as file:
            return [(str(message), str(error)) for message, error in map(orjson.loads, file)]
    except (OSError, ValueError):
        return []


def cause(last: bool = False) -> str | None:
    """The entry of `failures` that says most about why vLLM's processes ended, in one line; None where there is none.

    The end of a process by a signal counts more than an exception: those that wait for that process only say that they
    were cancelled.

    Args:
        last: the newest of a kind, for a server that has been ready; else the oldest, for a start.
    """
    found = failures()
    died = [sentence for message, sentence in found if _DIED.search(message)]
    causes = died or [sentence for _, sentence in found]
    return causes[-1 if last else 0] if causes else None


_DIED = re.compile(r"(?P<name>[\w.-]+) died unexpectedly \(exit code: -(?P<signal>\d+)\)")
_OF_SIGNALS = {
    signal.SIGILL: "an instruction that this processor or its kernel does not allow; is the image for another one?",
    signal.SIGBUS: "memory behind a mapped file was not there; the size of /dev/shm may be too small",
    signal.SIGSEGV: "a fault in native code",
    signal.SIGABRT: "native code gave up; what it said stands above in the log",
    signal.SIGKILL: "killed from outside, most often for memory",
}
"""What a signal that ends a process of vLLM mostly means. Source: signal(7)."""


def _death(message: str) -> str | None:
    """What to tell of a message of vLLM that says that a signal has ended one of its processes."""
    match = _DIED.search(message)
    if match is None:
        return None
    number = int(match["signal"])
    try:
        ended_by, why = signal.Signals(number).name, _OF_SIGNALS.get(signal.Signals(number))
    except ValueError:
        ended_by, why = f"signal {number}", None
    return f"vLLM's process {match['name']} was ended by {ended_by}" + (f" ({why})" if why else "")


STAGES = {
    "Starting to load model": "engine_process",
    "Loading model from scratch": "engine_process",
    "Loading weights took": "weights",
    "Model loading took": "weights",
    "%storch.compile took": "compile",
    "%sInitial profiling/warmup run took": "compile",
    "Graph capturing finished": "graphs",
}
"""How messages of vLLM begin, in its sources, that it logs at the end of a phase of a start."""


def milestones() -> dict[str, float]:
    """When the phases of `STAGES` ended, in the last of vLLM's processes, in seconds of the wall clock. Nothing where
    the operator has a logging configuration of their own, or a level above info."""
    found: dict[str, float] = {}
    path = os.environ.get("VLLM_LOGGING_CONFIG_PATH", "") + _MILESTONES
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        for phase, at in map(orjson.loads, file):
            found[phase] = max(found.get(phase, 0.0), at)
    return found


class _Notes(logging.Handler):
    """Writes to a file what its process has to tell the one that started it, which has no other way to know.

    Args:
        path: of a file that all of them append to, a JSON list a line. What is first counts, so that it does not grow
            for ever.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Append a line, if there is something to tell."""
        try:
            found = self.note(record)
            if found is None:
                return
            with open(self._path, "ab") as file:
                if file.tell() < _MOST_FAILURES:
                    file.write(orjson.dumps(found) + b"\n")
        except (OSError, ValueError, TypeError):
            self.handleError(record)

    def note(self, record: logging.LogRecord) -> list[str | float] | None:
        """What is told of a record; None for nothing."""
        raise NotImplementedError


class Milestones(_Notes):
    """Notes when vLLM's processes are through with a phase of their start."""

    def note(self, record: logging.LogRecord) -> list[str | float] | None:
        """The phase that the message ends, and when."""
        message = str(record.msg)
        phase = next((phase for beginning, phase in STAGES.items() if message.startswith(beginning)), None)
        return None if phase is None else [phase, record.created]


class Failures(_Notes):
    """Notes errors of vLLM's processes that have an exception, and processes that a signal has ended."""

    def note(self, record: logging.LogRecord) -> list[str | float] | None:
        """The message and its cause."""
        error = record.exc_info[1] if record.exc_info else None
        cause = _death(record.getMessage()) if error is None else describe(error)
        return None if cause is None else [record.getMessage(), cause]


def configuration(chosen: str, level: str, access_log: bool = False) -> dict[str, Any]:
    """The configuration for `logging.config.dictConfig`, as plain values that can be written as JSON."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"kserve_vllm": {"()": "kserve_vllm.telemetry.logs.formatter", "chosen": chosen}},
        "filters": {
            "no_probes": {"()": "kserve_vllm.telemetry.logs.NoProbes"},
            "client_faults": {"()": "kserve_vllm.engine.faults.ClientFaults"},
        },
        "handlers": {
            "kserve_vllm": {
                "class": "logging.StreamHandler",
                "formatter": "kserve_vllm",
                "filters": ["client_faults"],
                "stream": "ext://sys.stderr",
            }
        },
        "root": {"handlers": ["kserve_vllm"], "level": "INFO"},
        "loggers": {
            "vllm": {"handlers": [], "level": level, "propagate": True},
            # Says once that a trace context is ignored; it is not: it goes to the runtime's own spans.
            "vllm.tracing.utils": {"level": "ERROR"},
            # Named, since libraries set the root's level while they are imported.
            "kserve_vllm": {"level": "INFO"},
            "uvicorn": {"level": "INFO"},
            # Named, since vLLM applies this again while it is imported, which undoes what uvicorn has set.
            "uvicorn.access": {"level": "INFO", "handlers": [], "filters": ["no_probes"], "propagate": access_log},
            "kserve": {"handlers": [], "level": "WARNING", "propagate": True},
            "httpx": {"level": "WARNING"},
            "httpx2": {"level": "WARNING"},
        },
    }


class NoProbes(logging.Filter):
    """Lets no access line of a health check or of a scrape through."""

    def filter(self, record: logging.LogRecord) -> bool:
        """uvicorn's arguments are client, method, path, HTTP version and status."""
        path = str(record.args[2]).partition("?")[0] if isinstance(record.args, tuple) and len(record.args) > 2 else ""
        return "/health" not in path and path.rstrip("/") not in ("", "/ping", "/metrics")


def _coloured() -> bool:
    """Whether a person's lines have colours: on a terminal that has them, unless NO_COLOR says no (no-color.org)."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def formatter(chosen: str = "json") -> logging.Formatter:
    """A formatter for lines of structlog's loggers and of every other."""
    # Here, because in vLLM's processes nothing else of ours runs.
    logging.captureWarnings(True)
    before: list[Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        _add_process,
        add_request,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if chosen == "console":
        last: list[Processor] = [structlog.dev.ConsoleRenderer(colors=_coloured(), pad_event_to=0)]
    else:
        last = [structlog.processors.format_exc_info, _order, structlog.processors.JSONRenderer(serializer=_dumps)]
    made = structlog.stdlib.ProcessorFormatter if chosen == "console" else _JSONFormatter
    return made(
        foreign_pre_chain=before,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )


def write_event(logger: logging.Logger, level: int, name: str, fields: Mapping[str, object]) -> None:
    """Write what structlog's loggers would, without its chain of processors and a search of the stack for the caller:
    for the line that each request has.

    Args:
        logger: of the standard library.
        level: its number.
        name: of the event.
        fields: of the line, beside those that every line has.
    """
    if not logger.isEnabledFor(level):
        return
    word = logging.getLevelName(level)
    event: dict[str, object] = {
        "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        "level": word.lower(),
        "logger": logger.name,
        "event": name,
        **fields,
    }
    record = logging.LogRecord(logger.name, level, "", 0, add_request(logger, name, event), None, None)
    # By these structlog's formatter knows that the message is a dictionary.
    record._logger, record._name = logger, word.lower()
    record.in_order = True
    logger.handle(record)


class _JSONFormatter(structlog.stdlib.ProcessorFormatter):
    """structlog's, with a short way for `write_event`."""

    def format(self, record: logging.LogRecord) -> str:
        """logging's."""
        if getattr(record, "in_order", False):
            return _dumps(record.msg)
        return super().format(record)


def add_request(logger: object, name: str, event: Event) -> Event:
    """structlog's processor that writes the ids of the request which is being answered."""
    context = current.get()
    if context is not None:
        event.setdefault("request_id", context.request_id)
        if context.trace.trace_id:
            event.setdefault("trace_id", context.trace.trace_id)
    return event


def _add_process(logger: object, name: str, event: Event) -> Event:
    """The name of vLLM's process, where it is not the front end."""
    record = event.get("_record")
    process = getattr(record, "vllm_process_name", None) or getattr(record, "processName", None)
    if process and process != "MainProcess":
        event["process"] = process
    return event


def _order(logger: object, name: str, event: Event) -> Event:
    """Time, level, logger and event first: what a person looks for."""
    first = {key: event.pop(key) for key in ("timestamp", "level", "logger", "event") if key in event}
    return {**first, **event}


def _dumps(event: object, **_: object) -> str:
    return orjson.dumps(event, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
