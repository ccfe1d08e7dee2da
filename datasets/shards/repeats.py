"""Keys that stand in more than one shard, found by the hashes that sidecars hold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from datasets.errors import UserError
from datasets.shards.checking import Wanted, brought, temporary
from datasets.shards.indexing import shown_url
from datasets.shards.scan import Problem
from datasets.shards.sidecar import Table

_AT_ONCE = 1 << 24  # samples, of some 75 bytes each: of more, a share of all hashes is looked at at a time


def repeats(wanted: list[Wanted], samples: int) -> Iterator[tuple[str, Problem]]:
    """For each shard with keys of one before it, a remark with the first such key and how many there are.

    Shards without a sound sidecar are passed over. All sidecars are read once for `_AT_ONCE` samples.

    Args:
        wanted: the shards, in order.
        samples: in all of them, about.
    """
    passes = samples // _AT_ONCE + 1
    found: dict[int, tuple[int, int, int]] = {}  # by shard: row, a shard before that has its key, keys
    for number in range(passes):
        for shard, (row, first, count) in _pass(wanted, number, passes).items():
            before = found.get(shard, (row, first, 0))
            found[shard] = (*min(before[:2], (row, first)), before[2] + count)
    for shard, (row, first, count) in sorted(found.items()):
        yield wanted[shard].url, _remark(wanted[shard], row, wanted[first], count)


def _pass(wanted: list[Wanted], number: int, passes: int) -> dict[int, tuple[int, int, int]]:
    """Among the keys whose hashes leave the remainder `number`."""
    hashes, shards, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    for shard, each in enumerate(wanted):
        own = _hashes(each)
        chosen = np.flatnonzero(own % np.uint64(passes) == number)
        hashes.append(own[chosen])
        shards.append(np.full(len(chosen), shard, np.int32))
        rows.append(chosen)
    values, owners, places = np.concatenate(hashes), np.concatenate(shards), np.concatenate(rows)
    order = np.argsort(values, kind="stable")  # equal ones stay in the order of the shards
    values, owners, places = values[order], owners[order], places[order]
    begins = np.flatnonzero(np.r_[True, values[1:] != values[:-1]][: len(values)])
    firsts = np.repeat(owners[begins], np.diff(np.r_[begins, len(values)]))
    again = np.flatnonzero(owners != firsts)
    again = again[np.lexsort((places[again], owners[again]))]
    numbers, starts, counts = np.unique(owners[again], return_index=True, return_counts=True)
    at = again[starts]
    columns = (numbers, places[at], firsts[at], counts)
    return {
        shard: (row, first, count)
        for shard, row, first, count in zip(*(column.tolist() for column in columns), strict=True)
    }


def _hashes(wanted: Wanted) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    with temporary() as folder:
        try:
            if wanted.sidecar:
                return Table.open(brought(wanted.sidecar, folder / "shard.idx")).key_hashes()
        except UserError:  # which is a problem by itself
            pass
    return np.empty(0, np.uint64)


def _remark(wanted: Wanted, row: int, first: Wanted, count: int) -> Problem:
    with temporary() as folder:
        sample = Table.open(brought(wanted.sidecar, folder / "shard.idx"))[row]
    more = f", and {count - 1} more of its keys in that or others before it" if count > 1 else ""
    offset = min((place.offset for place in sample.places), default=0)
    reason = f"{shown_url(first.url)} has a sample of this key too{more}"
    return Problem("repeated", offset, reason, sample.key)
