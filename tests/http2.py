"""A client of HTTP/2 that sends what it is told, also what no library would."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes, Settings

from tests.robustness.wire import connect, opened


class Answer(NamedTuple):
    """An answer over HTTP/2."""

    status: int
    headers: dict[str, str]
    body: bytes
    reset: int | None = None


class Client:
    """Speaks HTTP/2 as it likes: headers go out as they are given."""

    def __init__(self, port: int, window: int | None = None) -> None:
        self.sock = connect(port)
        self.h2 = H2Connection(
            H2Configuration(
                client_side=True,
                header_encoding="latin-1",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
                validate_inbound_headers=False,
            )
        )
        if window is not None:
            self.h2.local_settings = Settings(client=True, initial_values={SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.h2.initiate_connection()
        self.found: list[Event] = []
        opened.append(self.sock)
        self.flush()

    def flush(self) -> None:
        """Send what there is."""
        if data := self.h2.data_to_send():
            self.sock.sendall(data)

    def begin(self, method: str, path: str, *fields: tuple[str, str], end: bool = True, host: str = "x") -> int:
        """Send a head."""
        stream = self.h2.get_next_available_stream_id()
        pseudo = [(":method", method), (":scheme", "http"), (":path", path), (":authority", host)]
        head = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (*pseudo, *fields)]
        self.h2.send_headers(stream, head, end_stream=end)
        self.flush()
        return stream

    def send(self, stream: int, data: bytes, end: bool = True) -> None:
        """Send a part of the body, which the window lets go."""
        self.h2.send_data(stream, data, end_stream=end)
        self.flush()

    def until(self, done: Callable[[Event], bool], take: bool = True) -> Event:
        """The first event of a kind; with `take` the windows are given back."""
        seen = 0
        while True:
            for event in self.found[seen:]:
                if done(event):
                    return event
            seen = len(self.found)
            self.more(take)

    def more(self, take: bool = True) -> None:
        """Read what the server sends next."""
        data = self.sock.recv(1 << 16)
        if not data:
            raise ConnectionError("the connection is closed")
        new = self.h2.receive_data(data)
        for event in new:
            if take and isinstance(event, DataReceived) and event.flow_controlled_length:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id or 0)
        self.flush()
        self.found += new

    def answer(self, stream: int) -> Answer:
        """The whole answer on a stream."""
        self.until(lambda e: isinstance(e, (StreamEnded, StreamReset)) and e.stream_id == stream)
        mine = [event for event in self.found if getattr(event, "stream_id", None) == stream]
        heads = [event for event in mine if isinstance(event, ResponseReceived)]
        headers = {str(name): str(value) for name, value in (heads[0].headers or ())} if heads else {}
        body = b"".join(event.data or b"" for event in mine if isinstance(event, DataReceived))
        ended = any(isinstance(event, StreamEnded) for event in mine)
        reset = next((int(e.error_code or 0) for e in mine if isinstance(e, StreamReset)), None)
        return Answer(int(headers.pop(":status", 0)), headers, body, None if ended else reset)

    def ask(self, method: str, path: str, *fields: tuple[str, str], body: bytes = b"", host: str = "x") -> Answer:
        """One request, whole."""
        stream = self.begin(method, path, *fields, end=not body, host=host)
        if body:
            self.send(stream, body)
        return self.answer(stream)
