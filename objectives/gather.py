"""Rows of every rank: the only collectives an objective uses.

Ranks may hold different numbers of rows. A gather without gradient, or one whose backward scales by the
number of ranks, is the most common silent error of contrastive code: the loss looks right and the gradient
is not. Here what goes back is the transpose of what came, a sum over ranks.

n rows here, G rows of all ranks, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

Wire = Literal["exact", "bf16"]
"""How numbers travel: as they are, or rounded to bfloat16, which is half the bytes of float32."""


@dataclass(frozen=True, slots=True)
class Rows:
    """How many rows each rank holds, and which of them are ours."""

    counts: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None

    @property
    def offset(self) -> int:
        """Place of our first row among the rows of all ranks."""
        return sum(self.counts[: self.rank])

    def owner(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The ranks that hold these rows of all ranks, and their places there: two int64 of its shape."""
        ends = torch.tensor(self.counts, device=places.device).cumsum(0)
        rank = torch.searchsorted(ends, places, right=True)
        return rank, places - (ends - torch.tensor(self.counts, device=places.device))[rank]

    def gather(self, rows: Tensor) -> Tensor:
        """(n, ...) -> (G, ...): the rows of all ranks in rank order; gradients flow back to their owner."""
        if self.group is None:
            return rows
        return _Gather.apply(rows, self)  # pyright: ignore[reportReturnType]

    def collect(self, rows: Tensor, wire: Wire = "exact") -> Tensor:
        """(n, ...) -> (G, ...): the same without gradient."""
        if self.group is None:
            return rows
        longest = max(self.counts)
        sent = rows.bfloat16() if wire == "bf16" else rows.contiguous()
        if min(self.counts) < longest:
            padded = sent.new_zeros(longest, *rows.shape[1:])
            padded[: len(rows)] = sent
            sent = padded
        everyone = sent.new_empty(len(self.counts) * longest, *rows.shape[1:])
        dist.all_gather_into_tensor(everyone, sent, group=self.group)
        if min(self.counts) < longest:
            starts = range(0, len(everyone), longest)
            everyone = torch.cat([everyone[at : at + n] for at, n in zip(starts, self.counts, strict=True)])
        return everyone.to(rows.dtype)

    def give_back(self, gradient: Tensor, wire: Wire = "exact") -> Tensor:
        """(G, ...) -> (n, ...): the sum over ranks of what each has for our rows; the transpose of `collect`.

        What travels in bfloat16 is added in full precision.
        """
        if self.group is None:
            return gradient
        longest, world = max(self.counts), len(self.counts)
        sent = gradient.contiguous()
        if min(self.counts) < longest:
            padded = gradient.new_zeros(world, longest, *gradient.shape[1:])
            for block, part in zip(padded, torch.split(gradient, list(self.counts)), strict=True):
                block[: len(part)] = part
            sent = padded.flatten(0, 1)
        if wire == "bf16":
            sent = sent.bfloat16()
            parts = torch.empty_like(sent)
            dist.all_to_all_single(parts, sent, group=self.group)
            mine = parts.view(world, longest, *gradient.shape[1:]).sum(0, dtype=gradient.dtype)
        else:
            mine = gradient.new_empty(longest, *gradient.shape[1:])
            dist.reduce_scatter_tensor(mine, sent, group=self.group)
        return mine[: self.counts[self.rank]]

    def maximum(self, values: Tensor) -> Tensor:
        """The elementwise maximum over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values


def count_rows(rows: int, group: dist.ProcessGroup | None, device: torch.device) -> Rows:
    """Learn how many rows each rank holds."""
    if group is None:
        return Rows((rows,), 0, None)
    mine = torch.tensor([rows], device=device)
    counts = mine.new_empty(dist.get_world_size(group))
    dist.all_gather_into_tensor(counts, mine, group=group)
    return Rows(tuple(int(count) for count in counts), dist.get_rank(group), group)


def exchange(
    rows: Tensor, *, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Hand rows to the ranks that they are for, and take what they have for us; without gradient.

    Args:
        rows: those for rank 0 first; every rank calls this, also one that has none.
        send: how many go to each rank.
        receive: how many come from each rank.
        group: the ranks.

    Returns:
        What came, in rank order.
    """
    if group is None:
        return rows
    came = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(came, rows, list(receive), list(send), group=group)
    return came


class _Gather(torch.autograd.Function):
    """Collected forward, given back backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: Rows) -> Tensor:
        ctx.layout = layout
        return layout.collect(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.layout.give_back(gradients[0]), None


@dataclass(frozen=True, slots=True)
class Grid:
    """W ranks as r rows of c columns, r the largest divisor of W that is at most its root.

    A product of all rows with all columns needs, on each rank, only the rows of the ranks above and below
    it and the columns of those beside it: 2 (r + c - 2) blocks travel there and back in place of 2 (W - 1),
    as in SUMMA (van de Geijn and Watts, 1997). A prime number of ranks is one row: that is the usual
    gather of one side.
    """

    down: tuple[int, ...]
    """The ranks of our column of the grid, as places in the group."""
    across: tuple[int, ...]
    """The ranks of our row of the grid."""
    down_group: dist.ProcessGroup | None
    across_group: dist.ProcessGroup | None

    def rows_down(self, all_rows: Rows) -> Rows:
        """The rows of our column of ranks."""
        return self._part(all_rows, self.down, self.down_group)

    def rows_across(self, all_rows: Rows) -> Rows:
        """The rows of our row of ranks."""
        return self._part(all_rows, self.across, self.across_group)

    @staticmethod
    def _part(all_rows: Rows, members: tuple[int, ...], group: dist.ProcessGroup | None) -> Rows:
        counts = tuple(all_rows.counts[member] for member in members)
        return Rows(counts, members.index(all_rows.rank), group)


def sides(world: int) -> tuple[int, int]:
    """Rows and columns of the grid of so many ranks."""
    rows = max(r for r in range(1, math.isqrt(world) + 1) if world % r == 0)
    return rows, world // rows


_TIMEOUT = timedelta(hours=2)
"""Ranks wait for one that compiles or judges the model; who watches them is to say when that is too long."""
_GRIDS: WeakKeyDictionary[dist.ProcessGroup, Grid] = WeakKeyDictionary()


def grid_of(group: dist.ProcessGroup | None) -> Grid:
    """The grid of a group. Its groups are made on first use, by all ranks at once, and kept."""
    if group is None:
        return Grid((0,), (0,), None, None)
    if group not in _GRIDS:
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        _, columns = sides(world)
        down = tuple(range(rank % columns, world, columns))
        across = tuple(range(rank - rank % columns, rank - rank % columns + columns))
        # Every rank makes its column first: no two wait for each other in different groups.
        _GRIDS[group] = Grid(down, across, _subgroup(group, down), _subgroup(group, across))
    return _GRIDS[group]


def _subgroup(group: dist.ProcessGroup, members: tuple[int, ...]) -> dist.ProcessGroup | None:
    if len(members) == 1:
        return None
    if len(members) == dist.get_world_size(group):
        return group
    everyone = dist.get_process_group_ranks(group)
    ranks = [everyone[member] for member in members]
    made = dist.new_group(ranks, timeout=_TIMEOUT, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made
