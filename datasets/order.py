"""Which sample stands at which position, and who reads it: pure functions of numbers, without state.

A position counts samples from the start of a run. Over each epoch of a finite source every sample stands
at exactly one position; the tail of an epoch shares its global batch with the head of the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from math import isqrt

_ROUNDS = 6
_MASK = (1 << 64) - 1


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

    def __post_init__(self) -> None:
        assert self.size is None or self.size > 0, self.size

    def __getitem__(self, position: int) -> Slot:
        """The epoch and the index within the source of the sample at `position` >= 0."""
        assert position >= 0, position
        if self.size is None:
            return Slot(0, position)
        epoch, place = divmod(position, self.size)
        return Slot(epoch, _permute(place, size=self.size, keys=_round_keys(self.seed, epoch, self.size)))


def share(total: int, rank: int, ranks: int) -> range:
    """The places of `total` that `rank` of `ranks` owns: shares differ by at most one and join up in order.

    A global batch is shared among ranks, and a rank's share again among its micro-batches, so reading
    all of them in order gives the global batch whatever the two numbers are.
    """
    assert 0 <= rank < ranks, (rank, ranks)
    return range(total * rank // ranks, total * (rank + 1) // ranks)


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    digest = blake2b(f"order/{seed}/{epoch}/{size}".encode(), digest_size=8 * _ROUNDS).digest()
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
