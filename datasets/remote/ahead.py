"""Work done ahead by threads: what is queued is not queued again, and what does not fit is left out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Condition, Thread
from time import monotonic
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """A bounded queue and its threads, which are daemons: leaving the program waits for none."""

    def __init__(self, work: Callable[[T], None], *, threads: int, limit: int) -> None:
        """Start no thread yet.

        Args:
            work: is called with each item. It must not raise.
            threads: how many work at once.
            limit: items that may wait.
        """
        self._work = work
        self._threads = threads
        self._limit = limit
        self._changed = Condition()
        self._waiting: deque[T] = deque()
        self._known: set[T] = set()
        self._started: list[Thread] = []
        self._closed = False

    def __len__(self) -> int:
        """Items that wait or are worked on."""
        return len(self._known)

    def put(self, item: T) -> None:
        """Queue an item, unless it is there already or the queue is full."""
        if item in self._known:
            return
        with self._changed:
            if self._closed or item in self._known or len(self._waiting) >= self._limit:
                return
            self._known.add(item)
            self._waiting.append(item)
            if len(self._started) < self._threads:
                self._started.append(Thread(target=self._run, name="ahead", daemon=True))
                self._started[-1].start()
            self._changed.notify()

    def close(self, *, patience: float) -> None:
        """Forget what waits, and wait that long for what is worked on."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        until = monotonic() + patience
        for thread in self._started:
            thread.join(max(until - monotonic(), 0))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
                item = self._waiting.popleft()
            try:
                self._work(item)
            finally:
                with self._changed:
                    self._known.discard(item)
