"""Which sample stands at which position, and who reads it: pure functions of numbers, without state.

A position counts samples from the start of a run. Over each epoch of a finite source every sample stands
at exactly one position; the tail of an epoch shares its global batch with the head of the next one.

    samples of the manifest, in runs of R neighbours      what one read from a disk or a store can fetch
      -> runs permuted and joined                         a shard sorted by class is spread over the epoch
      -> cut into M lanes                                 a lane is read by one rank where M divides well
      -> shuffled within windows of a lane                what must be at hand at any time
      -> position p of the epoch is row p // M of lane p % M

Runs are permuted rather than shards because a window holds few shards and many runs: with shards of ten
thousand samples sorted by class, a window of permuted shards would show two classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from math import isqrt

import numpy as np

from datasets.errors import UserError

VERSION = 2
"""Changes whenever any position would get another sample: part of what a checkpoint is resumed on."""
RUN = 64
"""Samples of the longest run: neighbours in the manifest, read together from a remote store."""

_ROUNDS = 6
_MASK = (1 << 64) - 1
_RUNS_PER_WINDOW = 128


@dataclass(frozen=True, kw_only=True)
class Shuffle:
    """How samples are mixed. Part of a run: with other values its order is another one."""

    lanes: int = 8
    """Parts that are read side by side: at least as many as machines, best a multiple of the ranks. A mixture
    gives each source this many samples at a time."""
    window: int = 1 << 19
    """Samples of all lanes that are shuffled with each other; remote data need a cache that holds them."""

    def check(self, flag: str) -> None:
        """Refuse what cannot be shuffled.

        Raises:
            UserError: names the flag and the least value.
        """
        if self.lanes < 1:
            raise UserError(f"{flag}.lanes is {self.lanes}; it must be at least 1")
        if self.window < self.lanes:
            raise UserError(f"{flag}.window is {self.window}; it must be at least the {self.lanes} lanes")


@dataclass(frozen=True, slots=True)
class Slot:
    """What stands at a position."""

    epoch: int
    index: int


@dataclass(frozen=True, slots=True)
class Order:
    """`order[position]` is the Slot of a position; the same for ever, on every machine."""

    seed: int
    size: int | None
    """Samples in an epoch, or None for a source without end, which is read in its own order."""
    name: str = ""
    """Of the source: two sources of one run are shuffled unlike each other."""
    lanes: int = 8
    """M"""
    window: int = 1 << 19
    """Samples of all lanes that are shuffled with each other."""

    def __post_init__(self) -> None:
        assert self.size is None or self.size > 0, self.size
        assert 0 < self.lanes <= self.window, (self.lanes, self.window)

    def __getitem__(self, position: int) -> Slot:
        """The epoch and the index within the source of the sample at `position` >= 0."""
        assert position >= 0, position
        if self.size is None:
            return Slot(0, position)
        epoch, place = divmod(position, self.size)
        lane, row = self._lane(place)
        begin, end = self._bounds(lane)
        length = end - begin
        windows = self._windows(length)
        window = ((row + 1) * windows - 1) // length
        first, last = window * length // windows, (window + 1) * length // windows
        keys = _round_keys("window", self.seed, self.name, epoch, lane, window)
        row = first + _permute(row - first, size=last - first, keys=keys)
        return Slot(epoch, self._at(epoch, begin + row))

    def ahead(self, position: int) -> int | None:
        """The index to fetch when `position` is read, so that a window is at hand before it begins.

        Reading on asks once for each sample, run by run in each lane: before the first of its window is read,
        and less than two windows before it is read itself. What is read within a window of the start of a
        run may not be asked for. None where the source is read in its own order.
        """
        if self.size is None:
            return None
        epoch, place = divmod(position, self.size)
        lane, row = self._lane(place)
        begin, end = self._bounds(lane)
        length = end - begin
        window = -(-length // self._windows(length))
        later, row = divmod(row + window, length)
        return self._at(epoch + later, begin + row)

    def batch(self, start: int, stop: int) -> list[int]:
        """The positions from `start` to `stop`, lane by lane: the order in which a global batch stands.

        A rank's share of it (`share`) is then few lanes, and the same list on any number of ranks.
        """
        if self.size is None:
            return list(range(start, stop))
        places = np.arange(start, stop, dtype=np.int64) % self.size
        rows, more = divmod(self.size, self.lanes)
        odd = places - rows * self.lanes
        lanes = np.where(odd < 0, places % self.lanes, -(-(odd + 1) * self.lanes // max(more, 1)) - 1)
        return (start + np.argsort(lanes, kind="stable")).tolist()

    def _lane(self, place: int) -> tuple[int, int]:
        """Lane and row of a place in an epoch. Where lanes differ by one, the longer ones have a last row."""
        assert self.size is not None
        rows, more = divmod(self.size, self.lanes)
        row, lane = divmod(place, self.lanes)
        if row < rows:
            return lane, row
        return -(-(lane + 1) * self.lanes // more) - 1, rows

    def _bounds(self, lane: int) -> tuple[int, int]:
        """Where a lane begins and ends in the permuted samples."""
        assert self.size is not None
        return lane * self.size // self.lanes, (lane + 1) * self.size // self.lanes

    def _windows(self, length: int) -> int:
        """Windows that a lane of this many samples is cut into, as even as can be."""
        return -(-length * self.lanes // self.window)

    def _at(self, epoch: int, spot: int) -> int:
        """The index at a spot of the permuted and joined runs; the short last run stands anywhere."""
        assert self.size is not None
        run = run_length(self.size, lanes=self.lanes, window=self.window)
        runs, rest = divmod(self.size, run)
        keys = _round_keys("runs", self.seed, self.name, epoch, self.size, run)
        short = keys[0] % (runs + 1) * run
        if short <= spot < short + rest:
            return runs * run + spot - short
        number, place = divmod(spot if spot < short else spot - rest, run)
        return _permute(number, size=runs, keys=keys) * run + place


def run_length(size: int, *, lanes: int, window: int) -> int:
    """Neighbours that stay together in the order of `size` samples: at most RUN, fewer in small windows."""
    return max(1, min(RUN, min(window, size) // (lanes * _RUNS_PER_WINDOW)))


def share(total: int, rank: int, ranks: int) -> range:
    """The places of `total` that `rank` of `ranks` owns: shares differ by at most one and join up in order.

    A global batch is shared among ranks, and a rank's share again among its micro-batches, so reading
    all of them in order gives the global batch whatever the two numbers are.
    """
    assert 0 <= rank < ranks, (rank, ranks)
    return range(total * rank // ranks, total * (rank + 1) // ranks)


@lru_cache(maxsize=4096)
def _round_keys(*what: int | str) -> tuple[int, ...]:
    digest = blake2b(repr((VERSION, *what)).encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def _permute(place: int, *, size: int, keys: tuple[int, ...]) -> int:
    """A keyed permutation of range(size) at one place, in O(1) and without a table.

    A Feistel network over pairs (high, low) of numbers below `side`, where side * side is the first square
    >= size: each round is invertible whatever its function, so the whole is a permutation of the square.
    Results past `size` are fed in again (cycle walking, Black and Rogaway 2002), which is rarely needed
    because the square is at most 2 * sqrt(size) larger. Integers only: no library's stream can change it.
    """
    side = isqrt(size - 1) + 1
    while True:
        high, low = divmod(place, side)
        for key in keys:
            high, low = low, (high + _mix(low ^ key)) % side
        place = high * side + low
        if place < size:
            return place


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
