"""The one state of the process that every health check reads.

starting -> loading -> warming -> ready -> draining -> stopped
                               \\-> failed
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable


class State(enum.StrEnum):
    """Where the process is in its life."""

    STARTING = "starting"
    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class Lifecycle:
    """Holds the state, since when it holds, and why.

    Listeners are called with the lifecycle after each change, in the event loop's thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._state = State.STARTING
        self._since = clock()
        self._reason: str | None = None
        self._loaded = True
        self._listeners: list[Callable[[Lifecycle], None]] = []
        self._on_first_probe: Callable[[], None] | None = None

    @property
    def state(self) -> State:
        """The current state."""
        return self._state

    @property
    def reason(self) -> str | None:
        """Why the state was entered, in words, where there is more to say than the state's name."""
        return self._reason

    @property
    def seconds(self) -> float:
        """How long the current state has lasted, in seconds."""
        return self._clock() - self._since

    @property
    def live(self) -> bool:
        """False once the engine is dead or hangs: the kubelet should start the process again."""
        return self._state is not State.FAILED

    @property
    def ready(self) -> bool:
        """Whether new requests should be sent here."""
        return self._state is State.READY and self._loaded

    @property
    def loaded(self) -> bool:
        """False while the base model is unloaded through the repository API."""
        return self._loaded

    @property
    def over(self) -> bool:
        """Whether the process is on its way out, for good or bad."""
        return self._state in (State.DRAINING, State.STOPPED, State.FAILED)

    def on_change(self, listener: Callable[[Lifecycle], None]) -> None:
        """Call `listener` after every change of state or of `loaded`."""
        self._listeners.append(listener)

    def on_first_probe(self, listener: Callable[[], None]) -> None:
        """Call `listener` once, when a readiness probe is told for the first time that the server is ready."""
        self._on_first_probe = listener

    def probed(self) -> bool:
        """Whether new requests should be sent here: the answer to a readiness probe."""
        if self.ready and self._on_first_probe is not None:
            listener, self._on_first_probe = self._on_first_probe, None
            listener()
        return self.ready

    def to(self, state: State, reason: str | None = None) -> None:
        """Enter `state`. Nothing leaves `failed`, and nothing returns from `draining` to an earlier state."""
        if state is self._state or self._state is State.FAILED:
            return
        if self.over and state not in (State.STOPPED, State.FAILED):
            return
        self._state, self._since, self._reason = state, self._clock(), reason
        self._notify()

    def set_loaded(self, loaded: bool) -> None:
        """Record that the base model was unloaded or loaded again through the repository API."""
        if loaded != self._loaded:
            self._loaded = loaded
            self._notify()

    def report(self) -> dict[str, str | float | bool]:
        """The body of every readiness answer: `ready`, `live`, `state`, `seconds` and, if known, `reason`."""
        body: dict[str, str | float | bool] = {
            "ready": self.ready,
            "live": self.live,
            "state": self._state.value if self._loaded else "unloaded",
            "seconds": round(self.seconds, 1),
        }
        if self._reason:
            body["reason"] = self._reason
        return body

    def sentence(self) -> str:
        """The report as one sentence, for error messages."""
        state = self._state.value if self._loaded else "unloaded"
        because = f": {self._reason}" if self._reason else ""
        return f"The server is {state} (for {self.seconds:.1f} s){because}."

    def _notify(self) -> None:
        for listener in self._listeners:
            listener(self)
