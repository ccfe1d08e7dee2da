"""How well samples are shuffled, and what it costs to find them in 1.5 billion.

    python -m benchmarks.order [--out docs/order.png]

First, samples of ten classes are stored sorted by class, as a folder of classes is when it was packed.
Batches at random steps of many epochs are drawn in three ways: all samples shuffled; in the order of a run;
and with whole shards permuted in place of runs of neighbours, in the same lanes and windows. Then a manifest
of 150,000 shards of 10,000 samples is written, opened by a process of its own, and walked; there are no data
behind it. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets.order import Order
from datasets.shards.manifest import Manifest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = (3_000, 60_000, 1_000_000, 1_500_000_000)
CLASSES, BATCH = 10, 256
SHARDS, SAMPLES = 150_000, 10_000
OUTSIDE, MEGABYTES, MICROSECONDS, SECONDS = 0.01, 200, 50, 1.0
"""Bars: class counts outside the band of a full shuffle, memory for the manifest, CPU from a position to its
shard and row, opening a run."""
_START, _FIRST_BATCH = 10**9, 4096
_CHI_SQUARE = 21.666  # with 9 degrees of freedom, exceeded by 1 %
_EPOCHS = 1000
CONTROL, OURS, SHARDWISE = "full shuffle", "runs (this order)", "whole shards"
_INK = {CONTROL: "#999999", OURS: "#1f5fa8", SHARDWISE: "#c0504d"}


@dataclass(frozen=True)
class Quality:
    """How often each class stood in each of B batches of `BATCH` samples."""

    size: int
    """Samples in the epoch."""
    counts: np.ndarray
    """(B, CLASSES)"""

    def outside(self) -> float:
        """Share of the counts that lie outside the 99 % band of a full shuffle."""
        low, high = band(self.size)
        return float(((self.counts < low) | (self.counts > high)).mean())

    def chi_square(self) -> np.ndarray:
        """(B,) Of each batch, in units in which a full shuffle has the mean CLASSES - 1."""
        due = BATCH / CLASSES
        drawn = (self.size - 1) / (self.size - BATCH)  # without replacement
        return ((self.counts - due) ** 2).sum(1) / due * drawn

    def high(self) -> float:
        """Share of batches above the 99 % point of chi-square."""
        return float((self.chi_square() > _CHI_SQUARE).mean())


def spread(size: int) -> np.ndarray:
    """(BATCH + 1,) Probability that a full shuffle shows one class k times in a batch: hypergeometric."""
    k = np.arange(BATCH)
    own = size // CLASSES
    ratios = np.maximum(own - k, 0) * (BATCH - k) / ((k + 1) * (size - own - BATCH + k + 1.0))
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.maximum(ratios, 1e-300)))])
    chances = np.exp(logs - logs.max())
    return chances / chances.sum()


def band(size: int) -> tuple[int, int]:
    """The least and the greatest count of the 99 % band."""
    below = np.cumsum(spread(size))
    return int((below > 0.005).argmax()), int((below >= 0.995).argmax())


def full_shuffle(size: int, batches: int, seed: int) -> Quality:
    """The control: a batch of a full shuffle is a draw without replacement."""
    random = np.random.default_rng(seed)
    drawn = (random.choice(size, BATCH, replace=False) for _ in range(batches))
    return _quality(size, drawn)


def runs(size: int, batches: int, seed: int) -> Quality:
    """Global batches of the order of a run, at random steps."""
    random = np.random.default_rng(seed)
    order = Order(seed, size)
    starts = random.integers(0, _EPOCHS * size // BATCH, batches) * BATCH
    drawn = ([order[p].index for p in range(start, start + BATCH)] for start in starts.tolist())
    return _quality(size, drawn)


def whole_shards(size: int, batches: int, seed: int) -> Quality:
    """As `runs`, with shards permuted in their stead: what a window of few shards shows."""
    random = np.random.default_rng(seed)
    plan = Order(seed, size)
    shard = shard_size(size)
    lane = size // plan.lanes
    windows = -(-size // plan.window)

    def drawn() -> np.ndarray:
        shards = random.permutation(size // shard)
        window = random.integers(windows)
        first, last = window * lane // windows, (window + 1) * lane // windows
        each = BATCH // plan.lanes
        spots = [
            number * lane + first + random.choice(last - first, each, replace=False)
            for number in range(plan.lanes)
        ]
        at = np.concatenate(spots)
        return shards[at // shard] * shard + at % shard

    return _quality(size, (drawn() for _ in range(batches)))


def shard_size(size: int) -> int:
    """Samples in each shard: `SAMPLES`, or less where that would leave few shards."""
    return min(SAMPLES, size // 60)


def _quality(size: int, batches: Iterable[Sequence[int] | np.ndarray]) -> Quality:
    classes = (np.asarray(indices) * CLASSES // size for indices in batches)
    return Quality(size, np.array([np.bincount(each, minlength=CLASSES) for each in classes]))


WAYS: dict[str, Callable[[int, int, int], Quality]] = {
    CONTROL: full_shuffle,
    OURS: runs,
    SHARDWISE: whole_shards,
}


def shuffling(batches: int) -> dict[int, dict[str, Quality]]:
    """Measure and print every way at every size."""
    print(f"Ten classes, sorted; {batches:,} batches of {BATCH}. Counts of a class outside the band that")
    print("holds 99 % of a full shuffle's, batches above the 99 % point of chi-square, its mean (due: 9)")
    print(f"{'samples':>13}  {'band':6}  {'':17}  {'counts':>7}  {'batches':>7}  {'mean':>6}")
    found: dict[int, dict[str, Quality]] = {}
    for size in SIZES:
        low, high = band(size)
        found[size] = {way: measure(size, batches, 1) for way, measure in WAYS.items()}
        for way, each in found[size].items():
            bar = f"  bar {OUTSIDE:.0%} of counts" if way == OURS else ""
            missed = "  MISSED" if bar and each.outside() >= OUTSIDE else ""
            print(
                f"{size:13,}  {low:2}-{high:<3}  {way:17}  {each.outside():7.2%}  {each.high():7.2%}  "
                f"{each.chi_square().mean():6.2f}{bar}{missed}",
                flush=True,
            )
    return found


def plot(found: dict[int, dict[str, Quality]], path: Path) -> None:
    """One panel for each size: how often a class stands how many times in a batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.6), dpi=110, layout="constrained")
    panels: Sequence[Axes] = figure.subplots(2, 2, sharex=True, sharey=True).flat  # pyright: ignore
    for axes, (size, ways) in zip(panels, found.items(), strict=True):
        low, high = band(size)
        axes.axvspan(low - 0.5, high + 0.5, color="#eef3e6", linewidth=0, label="99 % band of a full shuffle")
        for way, each in ways.items():
            _draw(axes, each, way)
        axes.set_title(f"{size:,} samples in shards of {shard_size(size):,}", fontsize=11, loc="left")
        axes.set_xlim(-0.5, 80)
        axes.set_ylim(bottom=0)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False)
    figure.supxlabel(f"samples of one class in a batch of {BATCH}", fontsize=9)
    figure.supylabel("share of (batch, class)", fontsize=9)
    figure.savefig(path)


def _draw(axes: Axes, each: Quality, way: str) -> None:
    shares = np.bincount(each.counts.ravel(), minlength=BATCH + 1) / each.counts.size
    label = f"{way}: {each.outside():.1%} outside"
    places = np.arange(BATCH + 1)
    if way == CONTROL:
        axes.bar(places, shares, width=1.0, color=_INK[way], alpha=0.45, label=label)
    else:
        axes.plot(places, shares, color=_INK[way], linewidth=1.6, label=label)


def opening(path: Path) -> dict[str, float]:
    """What a process pays to open the manifest and to find the first batch of a run far into its data."""
    wall, cpu, before = time.perf_counter(), time.process_time(), _memory("VmRSS")
    manifest = Manifest.load(path)
    order = Order(0, manifest.size)
    located = [manifest.locate(order[p].index) for p in order.batch(_START, _START + _FIRST_BATCH)]
    return {
        "located": len(located),
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "megabytes": _memory("VmRSS") - before,
        "peak_megabytes": _memory("VmHWM") - before,
    }


def opened_elsewhere(path: Path) -> dict[str, float]:
    """`opening` in a process that did nothing before."""
    command = [sys.executable, "-m", "benchmarks.order", "--open", str(path)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def walk(manifest: Manifest, positions: range) -> float:
    """CPU microseconds from a position to the shard and the row of its sample."""
    order = Order(0, manifest.size)
    before = time.process_time()
    for position in positions:
        manifest.locate(order[position].index)
    return (time.process_time() - before) / len(positions) * 1e6


def _memory(field: str) -> float:
    """Megabytes that Linux says this process has (VmRSS), or had at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024 / 1e6
    raise LookupError(field)


def finding(steps: int) -> list[bool]:
    """Measure and print what it costs to find samples; whether each bar is met."""
    print(f"\n{SHARDS:,} shards of {SAMPLES:,} samples, without data")
    manifest = Manifest.synthetic(SHARDS, SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.json"
        manifest.save(path)
        size = path.stat().st_size / 1e6
        opened = opened_elsewhere(path)
    each = walk(manifest, range(_START, _START + steps))
    return [
        _told(f"memory, kept ({size:.1f} MB on disk)", opened["megabytes"], MEGABYTES, "MB"),
        _told("memory, at most while it opens", opened["peak_megabytes"], MEGABYTES, "MB"),
        _told(f"open at {_START:,}, {_FIRST_BATCH:,} found", opened["seconds"], SECONDS, "s"),
        _told(f"position to row, of {steps:,} in turn", each, MICROSECONDS, "us CPU"),
    ]


def _told(what: str, value: float, bar: float, unit: str) -> bool:
    missed = "" if value < bar else "  MISSED"
    print(f"  {what:38} {value:8.2f} {unit:6}  bar {bar:g} {unit}{missed}", flush=True)
    return value < bar


def main() -> None:
    """Read the command line, measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to draw the shuffling, as a .png")
    parser.add_argument("--batches", type=int, default=6000, help="to look at for each size and way")
    parser.add_argument("--steps", type=int, default=1_000_000, help="positions to walk")
    parser.add_argument("--open", type=Path, help="only open this manifest, and say what it cost")
    options = parser.parse_args()
    if options.open:
        print(json.dumps(opening(options.open)))
        return
    found = shuffling(options.batches)
    if options.out:
        plot(found, options.out)
    mixed = [ways[OURS].outside() < OUTSIDE for ways in found.values()]
    sys.exit(0 if all(mixed + finding(options.steps)) else 1)


if __name__ == "__main__":
    main()
