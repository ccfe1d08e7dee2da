"""Rows of every rank, with gradient: the only collectives an objective uses.

Ranks may hold different numbers of rows. A gather without gradient, or one whose backward scales by the
number of ranks, is the most common silent error of contrastive code: the loss looks right and the gradient
is not. Here the backward is the transpose of the forward, a sum over ranks.

n rows here, G rows of all ranks, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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

    def gather(self, rows: Tensor) -> Tensor:
        """(n, ...) -> (G, ...): the rows of all ranks in rank order; gradients flow back to their owner."""
        if self.group is None:
            return rows
        return _Gather.apply(rows, self)  # pyright: ignore[reportReturnType]


def count_rows(rows: int, group: dist.ProcessGroup | None, device: torch.device) -> Rows:
    """Learn how many rows each rank holds."""
    if group is None:
        return Rows((rows,), 0, None)
    mine = torch.tensor([rows], device=device)
    counts = mine.new_empty(dist.get_world_size(group))
    dist.all_gather_into_tensor(counts, mine, group=group)
    return Rows(tuple(int(count) for count in counts), dist.get_rank(group), group)


class _Gather(torch.autograd.Function):
    """All-gather forward, reduce-scatter (sum) backward, over rows padded to the longest rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: Rows) -> Tensor:
        ctx.layout = layout
        longest = max(layout.counts)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        everyone = rows.new_empty(len(layout.counts) * longest, *rows.shape[1:])
        dist.all_gather_into_tensor(everyone, padded, group=layout.group)
        starts = range(0, len(everyone), longest) if longest else [0] * len(layout.counts)
        return torch.cat([everyone[at : at + count] for at, count in zip(starts, layout.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        layout: Rows = ctx.layout
        longest = max(layout.counts)
        padded = gradient.new_zeros(len(layout.counts), longest, *gradient.shape[1:])
        first = 0
        for block, count in zip(padded, layout.counts, strict=True):
            block[:count] = gradient[first : first + count]
            first += count
        mine = torch.empty_like(padded[0])
        dist.reduce_scatter_tensor(mine, padded.flatten(0, 1), group=layout.group)
        return mine[: layout.counts[layout.rank]], None
