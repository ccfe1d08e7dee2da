"""Open files, as few as the machine allows: 150,000 shards are read through some dozens of descriptors."""

from __future__ import annotations

import errno
import os
import resource
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

_SHARE = 8  # of the descriptors that a process may have: sources, sockets and libraries need theirs
_FEWEST, _MOST = 8, 1024


def allowed() -> int:
    """How many files one store may hold open, by this process's limit (`ulimit -n`)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MOST
    return min(max(limit // _SHARE, _FEWEST), _MOST)


@dataclass(slots=True)
class _Held:
    descriptor: int
    users: int = 0
    retired: bool = False
    """To be closed by its last user."""


class Descriptors:
    """The files used last, open. One that is being read is closed only after that: no read hits another's."""

    def __init__(self, opener: Callable[[int], int], *, limit: int) -> None:
        """Nothing is opened yet.

        Args:
            opener: gives an open descriptor for a number; what it raises goes to the reader.
            limit: files kept open. Those being read at the same time may be more.
        """
        self._opener = opener
        self._limit = limit
        self._lock = Lock()
        self._held: OrderedDict[int, _Held] = OrderedDict()

    def read(self, number: int, size: int, offset: int) -> bytes:
        """As `os.pread` of a file, which stays open meanwhile."""
        held = self._take(number)
        try:
            return os.pread(held.descriptor, size, offset)
        finally:
            with self._lock:
                held.users -= 1
                self._close_if_done(held)

    def drop(self, number: int) -> None:
        """Open this file anew when it is read next."""
        with self._lock:
            if number in self._held:
                self._retire(number)

    def close(self) -> None:
        """Close all; those being read by their readers."""
        with self._lock:
            for number in list(self._held):
                self._retire(number)

    def _take(self, number: int) -> _Held:
        with self._lock:
            if held := self._held.get(number):
                held.users += 1
                self._held.move_to_end(number)
                return held
        opened = _Held(self._open(number), users=1)  # others go on: a cold disk takes its time
        with self._lock:
            if number in self._held:
                self._retire(number)
            self._held[number] = opened
            while len(self._held) > self._limit:
                self._retire(next(iter(self._held)))
        return opened

    def _open(self, number: int) -> int:
        try:
            return self._opener(number)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        self.close()  # somebody else uses many
        return self._opener(number)

    def _retire(self, number: int) -> None:
        held = self._held.pop(number)
        held.retired = True
        self._close_if_done(held)

    @staticmethod
    def _close_if_done(held: _Held) -> None:
        if held.retired and held.users == 0:
            os.close(held.descriptor)
