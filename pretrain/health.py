"""How the data come: figures for every report, and a sentence when they hold training back.

Ranks wait for each other, so the worst one counts. It is found when a report is made, with one collective.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

import torch

from datasets.errors import KINDS
from datasets.health import Meter
from datasets.mixture import Account
from pretrain.bottleneck import Setting, why_late, why_slow
from pretrain.clock import Reading
from pretrain.distributed import Ranks
from pretrain.stopwatch import PARTS

_MENDED = tuple(f"mended/{kind}" for kind in (*KINDS, "cut", "control"))
_MEASURED = (
    "data_wait", "seconds", "waited", "cold", "steps", "queue", "retry",
    "read_count", "read_seconds", "read_p50", "read_p99", "read_max",
    "decode_count", "decode_seconds", "decode_p50",
    "fetch_count", "fetch_seconds", "fetch_p50", "fetch_p99", "fetch_bytes", "cache_hit", "cache_miss",
    *_MENDED, *PARTS, "towers", "flops", "peak",
)  # fmt: skip
_WORST = {
    "data/read_ms_p50": "read_p50",
    "data/read_ms_p99": "read_p99",
    "data/decode_ms_p50": "decode_p50",
    "data/fetch_ms_p50": "fetch_p50",
    "data/fetch_ms_p99": "fetch_p99",
}
Row = Mapping[str, float]
"""What a rank has measured since its last report, as `_MEASURED` has it; what did not happen is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """When something is said."""

    wait: float = 0.2
    """Share of the time spent waiting for data."""
    steps: int = 10
    seconds: float = 5.0
    """Training that is judged at a time, at least."""
    again: float = 1800.0
    """Seconds of training after which the same is said again."""


class Health:
    """Figures and sentences of one process; every rank has one and reports when the others do."""

    def __init__(
        self,
        meter: Meter,
        setting: Setting,
        ranks: Ranks,
        *,
        accounts: Mapping[str, Account],
        bounds: Bounds | None = None,
    ) -> None:
        """Begin; what was read before does not count.

        Args:
            meter: of all reading for training.
            setting: what reading has to work with.
            ranks: who reports together.
            accounts: where the sources stand.
            bounds: when something is said.
        """
        self.meter = meter
        self._bounds = bounds or Bounds()
        self._setting, self._ranks = setting, ranks
        self._begin = dict(accounts)
        self._before = (0.0, 0.0, 0.0)  # seconds, waited and cold as of the last report
        self._own = self._fetched = 0.0  # bytes of this and of all ranks, as of the last report
        self._judged = _nothing(ranks.world)
        self._said: tuple[str, float] = "", -math.inf
        meter.take()

    def report(
        self, reading: Reading, accounts: Mapping[str, Account], *, spent: Mapping[str, float] | None = None
    ) -> tuple[dict[str, float], str | None]:
        """All ranks call it together, and get the same.

        Args:
            reading: of the clock, as of the last step.
            accounts: where the sources stand after it.
            spent: on what, since the last report (`Stopwatch.take`).

        Returns:
            The figures since the last report, by metric, and a sentence if reading has become too slow.
        """
        before, self._before = self._before, (reading.seconds, reading.waited, reading.cold)
        seconds, waited, cold = (now - then for now, then in zip(self._before, before, strict=True))
        mine = {name: value for name, value in self.meter.take().items() if name in _MEASURED}
        self._own += mine.get("fetch_bytes", 0.0)
        mine |= {
            "data_wait": reading.data_wait,
            "seconds": seconds - cold,
            "waited": waited - cold,
            "cold": cold,
            **(spent or {}),
        }
        rows = self._of_all(mine)
        self._fetched += sum(row.get("fetch_bytes", 0.0) for row in rows)
        return figures(rows), self._judge(rows, reading.seconds, accounts)

    def late(self, seconds: float) -> str:
        """A sentence for a step of this rank that has not come for so long: what is under way."""
        fetched = self._own + self.meter.told("fetch_bytes")[0]
        return why_late(seconds, self.meter, fetched=fetched, setting=self._setting)

    def _of_all(self, mine: Row) -> list[Row]:
        """The same of every rank."""
        if self._ranks.group is None:
            return [mine]
        values = torch.tensor([mine.get(name, math.nan) for name in _MEASURED], dtype=torch.float64)
        gathered = self._ranks.gather(values.to(self._ranks.device)).tolist()
        return [
            {name: value for name, value in zip(_MEASURED, row, strict=True) if not math.isnan(value)}
            for row in gathered
        ]

    def _judge(self, rows: Sequence[Row], now: float, accounts: Mapping[str, Account]) -> str | None:
        """Why, where training has waited for data too much since this was judged last."""
        for sums, row in zip(self._judged, rows, strict=True):
            for name, value in row.items():
                sums[name] = max(sums[name], value) if name == "read_max" else sums[name] + value
        if any(sums["steps"] < self._bounds.steps for sums in self._judged):
            return None
        if self._judged[0]["seconds"] < self._bounds.seconds:
            return None
        judged, self._judged = self._judged, _nothing(len(rows))
        worst = max(range(len(judged)), key=lambda rank: judged[rank]["waited"])
        sums = judged[worst]
        share = sums["waited"] / sums["seconds"]
        if share <= self._bounds.wait:
            return None
        fetched = self._fetched if self._starting(accounts) else None
        reason, sentence = why_slow(sums, self._setting, fetched=fetched)
        said, since = self._said
        if reason == said and now - since < self._bounds.again:
            return None
        self._said = reason, now
        on = f" on rank {worst}" if len(judged) > 1 else ""
        return f"warning: training waits for data {share:.0%} of the time{on}: {sentence}"

    def _starting(self, accounts: Mapping[str, Account]) -> bool:
        """Whether a remote source has not come to the end of the first window that it reads."""
        window = self._setting.shuffle.window
        return any(
            accounts[name].position - self._begin.get(name, Account()).position < min(window, source.size)
            for name, source in self._setting.stored.items()
            if name in accounts
        )


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of what each rank has measured: latencies and waiting of the worst, counts and bytes of all."""

    def total(name: str) -> float:
        return sum(row.get(name, 0.0) for row in rows)

    found = {"perf/data_wait": max(row["data_wait"] for row in rows)}
    ready = [row["queue"] / row["steps"] for row in rows if row.get("steps")]
    if ready:
        found["data/queue"] = min(ready)
    for metric, name in _WORST.items():
        each = [row[name] for row in rows if name in row]
        if each:
            found[metric] = 1000 * max(each)
    if total("read_count"):
        found["data/retries"] = total("retry")
        found |= {f"data/{name}": count for name in _MENDED if (count := total(name))}
    asked = total("cache_hit") + total("cache_miss")
    if asked:
        seconds = max(row["seconds"] + row["cold"] for row in rows)
        found["data/cache_hits"] = total("cache_hit") / asked
        found["data/fetch_mib_per_second"] = total("fetch_bytes") / 2**20 / seconds
    return found | _spent([row for row in rows if "flops" in row and row["seconds"] > 0])


def _spent(rows: Sequence[Row]) -> dict[str, float]:
    """What time and arithmetic went into: means over ranks, and the rank that is slowest on its own."""
    if not rows:
        return {}

    def per_second(name: str) -> float:
        return mean(row[name] / row["seconds"] for row in rows)

    found = {f"perf/part/{part}": per_second(part) for part in PARTS}
    found["perf/part/data"] = per_second("waited")
    found["perf/tflops"] = per_second("flops") / 1e12
    if all(row["peak"] for row in rows):
        found["perf/mfu"] = mean(row["flops"] / row["seconds"] / row["peak"] for row in rows)
    alone = [row["waited"] + row.get("towers", 0.0) for row in rows]
    if len(rows) > 1 and median(alone):
        found["perf/slowest_rank"] = float(alone.index(max(alone)))
        found["perf/slowest_rank_factor"] = max(alone) / median(alone)
    return found


def _nothing(ranks: int) -> list[defaultdict[str, float]]:
    return [defaultdict[str, float](float) for _ in range(ranks)]
