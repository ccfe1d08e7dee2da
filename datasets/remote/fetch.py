"""Bytes of remote objects: what fails for a moment is asked for again, what fails for good is said at once.

Resets, stalls, timeouts, server errors and answers that end early are met by asking for the bytes still
missing, after a pause that doubles. No wait is without an end: a connection is dropped after `stall` seconds
without a byte, and a range is given up after `deadline` seconds, however many attempts that were.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from threading import Event
from time import monotonic
from urllib.parse import urlsplit

from datasets.errors import ShardError, UserError
from datasets.health import Meter
from datasets.homes import at_home
from datasets.remote import buckets, web
from datasets.remote.answer import Answer, GoneError, PassingError

PIECE = 64 * 2**20
"""The longest range that is asked for, in bytes, and what has to come within a deadline."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds
_TRANSPORTS: dict[str, Callable[..., AbstractContextManager[Answer]]] = {
    "http": web.ask,
    "https": web.ask,
    "s3": buckets.ask,
    "gs": buckets.ask,
}


@dataclass(frozen=True, kw_only=True)
class Remote:
    """How remote shards are read."""

    cache: float = 32.0
    """GiB of disk that ranges of remote shards are kept in, for all processes of a node together."""
    folder: str = ""
    """Where they are kept: a local disk, by default (XDG_CACHE_HOME or ~/.cache)/medley/shards."""
    deadline: float = 120.0
    """Seconds after which a range that did not come is given up, all attempts together."""
    stall: float = 10.0
    """Seconds without a byte after which a connection is dropped and the rest asked for again."""
    connections: int = 8
    """Ranges that a process fetches ahead at once."""

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: a value is out of its range.
        """
        if not (isfinite(self.cache) and self.cache * 2**30 >= 4 * PIECE):
            raise UserError(
                f"--remote.cache {self.cache:g} cannot be kept to: give GiB, 0.25 or more, which is 4 ranges"
            )
        for name in ("deadline", "stall", "connections"):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise UserError(f"--remote.{name} {value:g} cannot be kept to: give a number above 0")

    def place(self) -> Path:
        """The folder of the cache."""
        if self.folder:
            return at_home(self.folder)
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return at_home(home) / "medley" / "shards"


def is_remote(url: str) -> bool:
    """Whether this is a URL rather than a local path."""
    return "://" in url


def shown(url: str) -> str:
    """A URL for messages: without a password, and without the signature that a query may be."""
    scheme, _, rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def fetch(
    url: str,
    begin: int,
    end: int,
    *,
    remote: Remote,
    meter: Meter | None = None,
    size: int | None = None,
    waited: float = 0.0,
    stop: Event | None = None,
) -> bytes:
    """The bytes [begin, end) of an object.

    Args:
        url: http(s), s3 or gs.
        begin: the first byte.
        end: the byte after the last.
        remote: deadline and stall limit.
        meter: counts retries and bytes, and times the range.
        size: bytes that the object should have, if known; another number is refused where the server says it.
        waited: seconds of the deadline that have passed.
        stop: gives up as soon as it is set.

    Raises:
        ShardError: it is not there or forbidden, has another size, or did not come within the deadline.
        UserError: no such kind of URL, or a library for it is missing.
    """
    meter = meter or Meter()
    with meter.timed("fetch", shown(url)):
        pace = _Pace(url, remote, meter, stop or Event(), waited=waited)
        return b"".join(_stream(url, begin, end, pace, size))


def read_whole(url: str, *, remote: Remote, meter: Meter | None = None, stop: Event | None = None) -> bytes:
    """A small object, such as a manifest, in one request; raises as `fetch`."""
    meter = meter or Meter()
    with meter.timed("fetch", shown(url)):
        return b"".join(_stream(url, 0, None, _Pace(url, remote, meter, stop or Event()), None))


def fetch_to(url: str, path: Path, *, remote: Remote, meter: Meter | None = None) -> int:
    """Write a whole object to a file; returns its bytes. Raises as `fetch`, the file half written."""
    size = size_of(url, remote=remote)
    pace = _Pace(url, remote, meter or Meter(), Event())
    with path.open("wb") as file:
        for chunk in _stream(url, 0, size, pace, size):
            file.write(chunk)
    return size


def size_of(url: str, *, remote: Remote) -> int:
    """The bytes of an object; raises as `fetch`, also where a server does not say how many they are."""
    pace = _Pace(url, remote, Meter(), Event())
    while True:
        try:
            with _transport(url)(url, 0, 1, within=pace.within()) as answer:
                if answer.total is None:
                    raise GoneError("the server does not say how large it is")
                return answer.total
        except GoneError as error:
            raise pace.refused(error) from error
        except PassingError as error:
            pace.pause(error)


class _Pace:
    """How long one range may still take, and when it is asked for again."""

    def __init__(self, url: str, remote: Remote, meter: Meter, stop: Event, *, waited: float = 0.0) -> None:
        self._name = shown(url)
        self._remote = remote
        self._meter = meter
        self._stop = stop
        self._until = monotonic() + remote.deadline - waited
        self._failures = 0
        self._came = 0

    def within(self) -> float:
        """Seconds to wait for the next byte."""
        return max(min(self._remote.stall, self._until - monotonic()), 0.01)

    def came(self, count: int) -> None:
        """Note bytes. A long object is a row of pieces, each with its deadline."""
        self._meter.add("fetch_bytes", count)
        self._failures = 0 if count else self._failures
        self._came += count
        if self._came >= PIECE:
            self._came = 0
            self._until = monotonic() + self._remote.deadline
        elif self._stop.is_set() or monotonic() > self._until:
            self._give_up("it comes too slowly")

    def pause(self, error: PassingError) -> None:
        """Wait before the next attempt, at least as long as the server asked for."""
        self._failures += 1
        doubled = min(_FIRST_PAUSE * 2**self._failures, _LONGEST_PAUSE)
        seconds = max(random.uniform(doubled / 2, doubled), error.pause)
        if monotonic() + seconds >= self._until or self._failures >= error.attempts:
            self._give_up(str(error), error)
        self._meter.add("retry", reason=str(error))
        if self._stop.wait(seconds):
            self._give_up(str(error), error)

    def refused(self, error: GoneError) -> ShardError:
        """What is raised when trying again is in vain."""
        return ShardError(f"{self._name} cannot be read: {error}; put it back, or name data without it")

    def _give_up(self, reason: str, error: PassingError | None = None) -> None:
        if self._stop.is_set():
            raise ShardError(f"{self._name} was not read to its end: reading was stopped") from error
        raise ShardError(
            f"{self._name} could not be read within {self._remote.deadline:g} s: {reason}; see that its "
            "server answers, or raise --remote.deadline"
        ) from error


def _stream(url: str, begin: int, end: int | None, pace: _Pace, size: int | None) -> Generator[bytes]:
    """The bytes of a range, to the object's end if there is no `end`, over as many attempts as it takes."""
    at = begin
    while end is None or at < end:
        try:
            with _transport(url)(url, at, end, within=pace.within()) as answer:
                if None not in (size, answer.total) and size != answer.total:
                    raise GoneError(f"it has {answer.total} bytes, and had {size} when it was indexed")
                end = answer.total if end is None else end
                for received in answer.chunks:
                    chunk = received if end is None else received[: end - at]
                    at += len(chunk)
                    pace.came(len(chunk))
                    yield chunk
                    if at == end:
                        return
                if end is None:
                    return
                raise PassingError(f"the answer ended at byte {at}, {end - at} too early")
        except GoneError as error:
            raise pace.refused(error) from error
        except PassingError as error:
            pace.pause(error)


def _transport(url: str) -> Callable[..., AbstractContextManager[Answer]]:
    try:
        parts = urlsplit(url)
        scheme, _ = parts.scheme, parts.port  # which is read when it is asked for
    except ValueError as error:
        raise UserError(f"{shown(url)} is not written as URLs are ({error}): mend it") from error
    if scheme not in _TRANSPORTS:
        raise UserError(f"{shown(url)} cannot be read: give {', '.join(sorted(_TRANSPORTS))} or a local path")
    return _TRANSPORTS[scheme]
