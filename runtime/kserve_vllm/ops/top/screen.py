"""A terminal's second page, which is left as it was found, whatever ends or stops the command."""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable
from types import FrameType

_ENTER, _LEAVE = b"\x1b[?1049h\x1b[?25l", b"\x1b[?25h\x1b[?1049l"
_ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_KEYS = (b"q", b"Q", b"\x1b")
"""That end it; an arrow key sends more than an escape."""
Handler = Callable[[int, FrameType | None], object] | int | None


def is_live() -> bool:
    """Whether standard output is a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb")


class Screen:
    """The page, where `q` is heard; without a terminal, lines one after the other.

    Signals that end a process leave the page first, and so does ^Z; SIGCONT comes back to it. The codes are xterm's
    (1049: the second page with the cursor's place kept; 25: the cursor).

    Args:
        live: whether there is a terminal to draw on.
    """

    def __init__(self, live: bool) -> None:
        self._live = live
        self._modes: list[int | list[bytes | int]] | None = None
        self._handlers: dict[signal.Signals, Handler] = {}
        self._over = False

    def __enter__(self) -> Screen:
        if self._live:
            for number in _ENDS:
                self._handlers[number] = signal.signal(number, self._end)
            self._handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._stop)
            self._handlers[signal.SIGCONT] = signal.signal(signal.SIGCONT, self._go_on)
            self._open()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._live:
            return
        self._over = True
        self._close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def pressed(self, interval_s: float) -> bool:
        """Wait; whether a key that ends it was pressed, or there is nobody left who could."""
        if self._modes is None:
            time.sleep(interval_s)
            return False
        until = time.monotonic() + interval_s
        while (left := until - time.monotonic()) > 0:
            if select.select([sys.stdin], [], [], left)[0]:
                typed = os.read(sys.stdin.fileno(), 64)
                if not typed or typed in _KEYS or typed[:1] in _KEYS[:2]:
                    return True
        return False

    def show(self, page: str) -> None:
        """Draw a page over the one before."""
        if not self._live:
            print(page + "\n", flush=True)
            return
        size = shutil.get_terminal_size((120, 40))
        lines = [line[: size.columns] for line in page.splitlines()[: size.lines - 1]]
        sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        sys.stdout.flush()

    def _open(self) -> None:
        if sys.stdin.isatty():
            self._modes = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        # Past Python's buffer, which a signal may have found in mid-write.
        os.write(sys.stdout.fileno(), _ENTER)

    def _close(self) -> None:
        try:
            if self._modes is not None:
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._modes)
            sys.stdout.flush()
            os.write(sys.stdout.fileno(), _LEAVE)
        except (OSError, RuntimeError, termios.error):
            pass  # the terminal is gone (SIGHUP), or a page was half written

    def _end(self, number: int, _: FrameType | None) -> None:
        """End as the signal would have: the page is left on the way out."""
        if not self._over:
            raise SystemExit(128 + number)

    def _stop(self, _: int, __: FrameType | None) -> None:
        self._close()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)

    def _go_on(self, _: int, __: FrameType | None) -> None:
        if not self._over:
            self._open()
