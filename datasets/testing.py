"""A web server for tests that fails as real ones do, by a script."""

from __future__ import annotations

import fcntl
import re
import socket
import struct
import termios
from collections import defaultdict, deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Literal, Self

_CHUNK = 16384
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True, kw_only=True)
class Misstep:
    """How one request is answered; as it is, without a fault."""

    status: int = 0
    """Answer with this status and no content."""
    headers: tuple[tuple[str, str], ...] = ()
    """Besides or instead of the usual ones."""
    after: int | None = None
    """Bytes of the body after which `then` happens; None: after its end."""
    then: Literal["reset", "close", "stall"] = "close"
    pause: float = 0.0
    """Seconds between chunks of 16 KiB."""
    ranges: bool = True
    """False: send the whole object, whatever was asked for."""
    length: bool = True
    """False: do not say how much is coming; the end of the connection ends the body."""
    shift: int = 0
    """Send the bytes from so many further on, and say so."""
    flip: bool = False
    """Send one wrong byte."""


RESET = Misstep(after=0, then="reset")
STALL = Misstep(after=0, then="stall")
MISSING = Misstep(status=404)
BUSY = Misstep(status=503)


class FaultServer:
    """Serves a folder by ranges on the loopback device; a context."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, int, int]] = []
        """What was asked for, in order: name, begin, end (-1: open)."""
        self.connections = 0
        """Made so far."""
        self._script: defaultdict[str, deque[Misstep]] = defaultdict(deque)
        self._always: dict[str, Misstep] = {}
        self._lock = Lock()
        self.ended = Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.faults = self
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def url(self, name: str) -> str:
        """The URL of a file of the folder."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/{name}"

    def script(self, name: str, *missteps: Misstep) -> None:
        """Answer the next requests for a file like this, and then well; name `*`: whatever is asked for."""
        with self._lock:
            self._script[name].extend(missteps)

    def always(self, name: str, misstep: Misstep | None) -> None:
        """Answer all requests for a file (`*`: for any) like this, once the script has ended; None: well."""
        with self._lock:
            self._always.pop(name, None)
            if misstep is not None:
                self._always[name] = misstep

    def connected(self) -> None:
        """Note a connection."""
        with self._lock:
            self.connections += 1

    def next(self, name: str, begin: int, end: int) -> Misstep:
        """Note a request; gives how it is answered."""
        with self._lock:
            self.requests.append((name, begin, end))
            for script in (self._script[name], self._script["*"]):
                if script:
                    return script.popleft()
            return self._always.get(name) or self._always.get("*") or Misstep()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    faults: FaultServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the play."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 0
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        super().setup()
        self.server.faults.connected()

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        begin = int(asked[1]) if asked else 0
        end = int(asked[2]) + 1 if asked and asked[2] else -1
        misstep = self.server.faults.next(name, begin, end)
        path = self.server.faults.folder / name
        if misstep.status or not path.is_file():
            self._answer(misstep.status or 404, {"Content-Length": "0", **dict(misstep.headers)})
            return
        content = path.read_bytes()
        headers: dict[str, str] = {}
        status = 200
        if asked and misstep.ranges:
            if begin >= len(content):
                self._answer(416, {"Content-Length": "0", "Content-Range": f"bytes */{len(content)}"})
                return
            begin, end = begin + misstep.shift, min(end if end > 0 else len(content), len(content))
            status, headers["Content-Range"] = 206, f"bytes {begin}-{end - 1}/{len(content)}"
            content = content[begin:end]
        if misstep.length:
            headers["Content-Length"] = str(len(content))
        else:
            headers["Connection"] = "close"
        self._answer(status, {**headers, **dict(misstep.headers)})
        self._send(content, misstep)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, content: bytes, misstep: Misstep) -> None:
        if misstep.flip:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for at in range(0, len(content[: misstep.after]), _CHUNK):
            self.wfile.write(content[: misstep.after][at : at + _CHUNK])
            self.server.faults.ended.wait(misstep.pause)
        if misstep.after is None:
            self.close_connection = self.close_connection or not misstep.length
            return
        if misstep.then == "stall":
            self.server.faults.ended.wait()
        elif misstep.then == "reset":
            # A reset throws away what has not left yet, of which a busy machine has some.
            while any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))):
                if self.server.faults.ended.wait(0.001):
                    break
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True
