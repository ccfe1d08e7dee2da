"""How fast it goes, what share of the time it waits for data, and how long it will still take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple


class _Mark(NamedTuple):
    """Where the run stood at the end of a step, all since the clock was made."""

    seconds: float
    waited: float
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the clock says after a step. Pauses count nowhere."""

    seconds: float
    """Training time since the start."""
    samples_per_second: float
    """Over the window."""
    data_wait: float
    """Share of the window spent waiting for data, 0..1."""
    seconds_left: float
    """Training time still to come at the speed of the window."""


class Clock:
    """Training time of one process, from when it is made.

    clock = Clock()
    for step in ...:
        with clock.waiting(): batch = next(batches)
        ...
        clock.step(samples)
        with clock.pause(): save(...)
    """

    def __init__(self, *, window: int = 50, now: Callable[[], float] = time.perf_counter) -> None:
        """Start.

        Args:
            window: steps that the sliding figures look back on.
            now: seconds, from any origin.
        """
        self._now = now
        self._start = now()
        self._paused = 0.0
        self._waited = 0.0
        self._marks = deque([_Mark(0.0, 0.0, 0)], maxlen=window + 1)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside is spent waiting for data."""
        begin = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - begin

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside (an evaluation, a checkpoint) is not training time."""
        begin = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - begin

    def step(self, samples: int) -> None:
        """A step has ended.

        Args:
            samples: images of its global batch.
        """
        seconds = self._now() - self._start - self._paused
        self._marks.append(_Mark(seconds, self._waited, self._marks[-1].samples + samples))

    def read(self, *, remaining: int) -> Reading:
        """The figures as of the last step.

        Args:
            remaining: samples that the run has still to see.
        """
        first, last = self._marks[0], self._marks[-1]
        window = last.seconds - first.seconds
        speed = _rate(last.samples - first.samples, window)
        return Reading(
            seconds=last.seconds,
            samples_per_second=speed,
            data_wait=_rate(last.waited - first.waited, window),
            seconds_left=remaining / speed if speed else float("inf"),
        )


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
