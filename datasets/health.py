"""What reading costs: counters and latencies that any thread may add to, taken once per report.

A latency falls into one of a few hundred buckets, each 9 % wider than the one before, so that percentiles
over any number of reads take a fixed amount of memory and are right to 5 %.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock
from time import perf_counter

_PER_DOUBLING = 8  # buckets
_PERCENTILES = (50, 99)


class Meter:
    """Totals since they were last taken."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._latencies: defaultdict[str, Counter[int]] = defaultdict(Counter)

    def add(self, name: str, value: float = 1.0) -> None:
        """Count an event, or add bytes or seconds."""
        with self._lock:
            self._totals[name] += value

    @contextmanager
    def timed(self, name: str) -> Generator[None]:
        """Time what stands below, also when it raises."""
        start = perf_counter()
        try:
            yield
        finally:
            self.record(name, perf_counter() - start)

    def record(self, name: str, seconds: float) -> None:
        """Add one latency, in seconds."""
        bucket = math.floor(_PER_DOUBLING * math.log2(max(seconds, 1e-9)))
        with self._lock:
            self._totals[f"{name}_seconds"] += seconds
            self._latencies[name][bucket] += 1

    def take(self) -> dict[str, float]:
        """Totals since the last call, which starts them anew.

        What was timed as NAME is told as NAME_count, NAME_seconds (their sum), NAME_p50, NAME_p99 and
        NAME_max (seconds, right to 5 %). What did not happen is left out.
        """
        with self._lock:
            totals, self._totals = self._totals, defaultdict(float)
            latencies, self._latencies = self._latencies, defaultdict(Counter)
        taken = dict(totals)
        for name, buckets in latencies.items():
            taken[f"{name}_count"] = buckets.total()
            for percent in _PERCENTILES:
                taken[f"{name}_p{percent}"] = _percentile(buckets, percent / 100)
            taken[f"{name}_max"] = _middle(max(buckets))
        return taken


def _percentile(buckets: Counter[int], share: float) -> float:
    wanted = share * buckets.total()
    for bucket in sorted(buckets):
        wanted -= buckets[bucket]
        if wanted <= 0:
            return _middle(bucket)
    raise AssertionError("a share is at most 1")


def _middle(bucket: int) -> float:
    return 2 ** ((bucket + 0.5) / _PER_DOUBLING)
