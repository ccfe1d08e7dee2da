"""How fast it goes, how long it waits for data and will still take, and in how much memory."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import NamedTuple, Protocol

import torch


class _Mark(NamedTuple):
    """Where the run stood at the end of a step, all since the clock was made."""

    seconds: float
    waited: float
    cold: float
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
    waited: float
    """Seconds spent waiting for data since the start."""
    cold: float
    """Of these and of `seconds`, those waited where nothing was read ahead yet."""
    seconds_left: float
    """Training time still to come at the speed of the window."""
    step_seconds_p50: float
    """Median time of a step in the window."""
    step_seconds_p99: float
    """What 99 of 100 steps of the window do not exceed."""


class Watch(Protocol):
    """Who follows where the training thread stands."""

    def mark(self, doing: str, *, timed: bool) -> None:
        """It begins something; `timed` where that has to end soon."""

    def moved(self) -> None:
        """What it does goes on."""

    def stepped(self) -> None:
        """A step has ended."""


class Clock:
    """Training time of one process, from when it is made.

    clock = Clock()
    for step in ...:
        with clock.waiting(): batch = next(batches)
        ...
        clock.step(samples)
        with clock.pause(): save(...)
    """

    def __init__(
        self,
        *,
        window: int = 50,
        now: Callable[[], float] = time.perf_counter,
        watch: Watch | None = None,
    ) -> None:
        """Start.

        Args:
            window: steps that the sliding figures look back on.
            now: seconds, from any origin.
            watch: told what has begun.
        """
        self._watch = watch
        self._warm = False
        self._now = now
        self._start = now()
        self._paused = 0.0
        self._waited = 0.0
        self._cold = 0.0
        self._marks = deque([_Mark(0.0, 0.0, 0.0, 0)], maxlen=window + 1)

    @contextmanager
    def waiting(self, *, cold: bool = False) -> Iterator[None]:
        """Time inside is spent waiting for data; `cold` where nothing could be read ahead."""
        begin = self._now()
        self._warm &= not cold
        self._begins("waiting for data")
        try:
            yield
        finally:
            self._begins("in a step")
            took = self._now() - begin
            self._waited += took
            self._cold += took if cold else 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside (an evaluation, a checkpoint) is not training time."""
        begin = self._now()
        warm, self._warm = self._warm, False
        self._begins("saving or judging")
        try:
            yield
        finally:
            self._warm = warm
            self._begins("in a step")
            self._paused += self._now() - begin

    def move(self) -> None:
        """What it does is long, and goes on: another batch of an evaluation has come."""
        if self._watch is not None:
            self._watch.moved()

    def step(self, samples: int) -> None:
        """A step has ended.

        Args:
            samples: images of its global batch.
        """
        self._warm = True
        if self._watch is not None:
            self._watch.stepped()
        self._begins("between two steps")
        seconds = self._now() - self._start - self._paused
        self._marks.append(_Mark(seconds, self._waited, self._cold, self._marks[-1].samples + samples))

    def _begins(self, doing: str) -> None:
        """Tell whoever watches. The first step after everything was built has more time."""
        if self._watch is not None:
            self._watch.mark(doing, timed=self._warm)

    def read(self, *, remaining: int) -> Reading:
        """The figures as of the last step.

        Args:
            remaining: samples that this start has still to see.
        """
        first, last = self._marks[0], self._marks[-1]
        window = last.seconds - first.seconds
        each = sorted(after.seconds - before.seconds for before, after in pairwise(self._marks)) or [0.0]
        speed = _rate(last.samples - first.samples, window)
        return Reading(
            seconds=last.seconds,
            samples_per_second=speed,
            data_wait=_rate(last.waited - first.waited, window),
            waited=last.waited,
            cold=last.cold,
            seconds_left=remaining / speed if speed else float("inf"),
            step_seconds_p50=each[len(each) // 2],
            step_seconds_p99=each[ceil(0.99 * len(each)) - 1],
        )


def peak_memory(device: torch.device) -> float:
    """GiB that this process has held at most: of the GPU's memory, or of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
