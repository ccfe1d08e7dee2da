"""What reading costs: counters and latencies that any thread may add to, taken once per report.

A latency falls into one of a few hundred buckets, each 9 % wider than the one before, so that percentiles
over any number of reads take a fixed amount of memory and are right to 5 %. What is under way is known too:
who waits can say for what.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from threading import Lock
from time import perf_counter

_PER_DOUBLING = 8  # buckets
_PERCENTILES = (50, 99)


@dataclass(frozen=True, slots=True)
class Running:
    """Something that is under way."""

    name: str
    """Under which it is timed."""
    what: str
    """The shard or sample that it is about."""
    seconds: float
    """Since it began."""


class Meter:
    """Totals since they were last taken."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._latencies: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self._reasons: dict[str, str] = {}
        self._running: dict[object, tuple[str, str, float]] = {}

    def add(self, name: str, value: float = 1.0, *, reason: str = "") -> None:
        """Count an event, or add bytes or seconds; the last reason is kept."""
        with self._lock:
            self._totals[name] += value
            if reason:
                self._reasons[name] = reason

    def timed(self, name: str, what: str = "") -> Timed:
        """A context that times what stands in it, also when it raises.

        Args:
            name: what is done.
            what: to which shard or sample, for as long as it takes.
        """
        return Timed(self, name, what)

    def record(self, name: str, seconds: float) -> None:
        """Add one latency, in seconds."""
        bucket = math.floor(_PER_DOUBLING * math.log2(max(seconds, 1e-9)))
        with self._lock:
            self._totals[f"{name}_seconds"] += seconds
            self._latencies[name][bucket] += 1

    def begin(self, timed: Timed) -> None:
        """Something is under way."""
        self._running[timed] = timed.name, timed.what, timed.start  # one assignment needs no lock

    def end(self, timed: Timed) -> None:
        """It is done."""
        del self._running[timed]
        self.record(timed.name, perf_counter() - timed.start)

    def running(self) -> list[Running]:
        """What is under way, longest first."""
        now = perf_counter()
        # In the order in which they began; a copy is made at once.
        return [Running(name, what, now - start) for name, what, start in list(self._running.values())]

    def told(self, name: str) -> tuple[float, str]:
        """The total of a name since it was taken, which goes on, and the last reason given for it, if any."""
        with self._lock:
            return self._totals.get(name, 0.0), self._reasons.get(name, "")

    def take(self) -> dict[str, float]:
        """Totals since the last call, which starts them anew.

        What was timed as NAME is told as NAME_count, NAME_seconds (their sum), NAME_p50, NAME_p99 and
        NAME_max (seconds, right to 5 %). What did not happen is left out.
        """
        with self._lock:
            totals, self._totals = self._totals, defaultdict(float)
            latencies, self._latencies = self._latencies, defaultdict(Counter)
            self._reasons = {}
        taken = dict(totals)
        for name, buckets in latencies.items():
            taken[f"{name}_count"] = buckets.total()
            for percent in _PERCENTILES:
                taken[f"{name}_p{percent}"] = _percentile(buckets, percent / 100)
            taken[f"{name}_max"] = _middle(max(buckets))
        return taken


class Timed:
    """What `Meter.timed` gives: a class, because this is entered several times for every sample."""

    __slots__ = ("_meter", "name", "start", "what")

    def __init__(self, meter: Meter, name: str, what: str) -> None:
        self._meter, self.name, self.what, self.start = meter, name, what, 0.0

    def __enter__(self) -> None:
        self.start = perf_counter()
        self._meter.begin(self)

    def __exit__(self, *_: object) -> None:
        self._meter.end(self)


def _percentile(buckets: Counter[int], share: float) -> float:
    wanted = share * buckets.total()
    for bucket in sorted(buckets):
        wanted -= buckets[bucket]
        if wanted <= 0:
            return _middle(bucket)
    raise AssertionError("a share is at most 1")


def _middle(bucket: int) -> float:
    return 2 ** ((bucket + 0.5) / _PER_DOUBLING)
