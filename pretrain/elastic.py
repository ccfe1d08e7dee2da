"""The same bits on any number of ranks: lanes of a fixed shape, added up in a fixed order.

A sum of floats depends on the order in which it is made, and a product of matrices on their shapes. So the
global batch is cut into M lanes whatever the number of ranks, every lane is a micro-batch of its own, and
gradients are added in one binary tree whose leaves are the lanes: over the lanes of a rank first, then over
ranks. What lanes say together, every rank computes for all of them, as one rank would.

The tree over ranks sends what a ring all-reduce sends: each rank adds up one part of the vector, and all
parts are gathered.

M lanes, W ranks, k = M / W lanes of a rank, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from datasets.batch import Batch
from datasets.errors import UserError
from objectives.base import Pass, Terms
from objectives.gather import count_rows
from pretrain.distributed import Ranks
from pretrain.parallel import Circled, Wrapped, same_on_all
from pretrain.pretrainer import Pretrainer, join
from pretrain.sums import add_terms

Gradient = list[Tensor | None]
"""Of each parameter, in their order; None where nothing reached it."""


def check_lanes(batch: int, micro_batches: int, lanes: int) -> None:
    """Refuse a batch that cannot be cut into lanes of one shape.

    Raises:
        UserError: names the flag.
    """
    if lanes & (lanes - 1):
        raise UserError(
            f"--deterministic elastic adds --shuffle.lanes {lanes} up in pairs: take a power of two of them"
        )
    if batch % lanes:
        raise UserError(
            f"--deterministic elastic cuts a batch of {batch} into --shuffle.lanes {lanes}: make the batch "
            "a multiple of the lanes"
        )
    if micro_batches > 1:
        raise UserError(
            "--deterministic elastic works lane by lane: leave the micro-batches out, and take more "
            "--shuffle.lanes for less memory"
        )


def check_ranks(lanes: int, ranks: int) -> None:
    """Refuse ranks that would hold unequal numbers of lanes.

    Raises:
        UserError: names the flag and both numbers.
    """
    if lanes % ranks:
        raise UserError(
            f"--deterministic elastic shares --shuffle.lanes {lanes} among {ranks} ranks: take a number of "
            "ranks that divides them"
        )


class Elastic(Wrapped):
    """A pretrainer whose gradients and losses have the same bits on 1, 2, 4, ... ranks."""

    def __init__(self, pretrainer: Pretrainer, ranks: Ranks, *, lanes: int) -> None:
        """Take it over, where `check_ranks` lets it pass."""
        super().__init__(pretrainer, ranks)
        # What lanes say together is said as on one rank, and pushing a lane asks nothing of others.
        pretrainer.group = None
        if ranks.group is not None:
            same_on_all(pretrainer, ranks)
        if ranks.device.type == "cuda":
            # Of what torch has in two ways, the one that adds in a fixed order; where it has none it says so.
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.always_circles, self.lends_pull = True, False
        self._parameters = list(pretrainer.parameters())
        self.micro_batches = self._lanes = lanes // ranks.world
        self._leaves: list[tuple[int, Gradient]] = []

    def ordered(self, batches: Sequence[Batch]) -> list[Batch]:
        """Lane by lane instead of source by source: a lane's sources are one leaf of the tree."""
        sources = len(batches) // self._lanes
        assert len(batches) == sources * self._lanes, (len(batches), self._lanes)
        return [batches[s * self._lanes + lane] for lane in range(self._lanes) for s in range(sources)]

    def piece(self, place: int, places: int) -> tuple[int, ...]:
        """Its place among all ranks' micro-batches."""
        return (self.ranks.rank * places + place,)

    def circled(self, given: Mapping[Pass, Tensor], joined: Batch) -> Circled:
        """All lanes of all ranks; every rank couples all of them."""
        parts = self.ranks.gather_objects(joined.to(torch.device("cpu")))
        before = parts[: self.ranks.rank]
        everything = {
            at: count_rows(len(rows), self.ranks.group, rows.device).gather(rows)
            for at, rows in given.items()
        }
        return Circled(
            given=everything,
            batch=join([part.to(self.ranks.device) for part in parts]),
            first_image=sum(len(part.images) for part in before),
            first_text=sum(len(part.tokens) for part in before),
        )

    def pushed(self, place: int, places: int) -> None:
        """After a lane's last source: its gradient is a leaf."""
        if (place + 1) % (places // self._lanes):
            return
        leaf: Gradient = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        height = 0
        while self._leaves and self._leaves[-1][0] == height:
            leaf = [_plus(one, other) for one, other in zip(self._leaves.pop()[1], leaf, strict=True)]
            height += 1
        self._leaves.append((height, leaf))

    def finish(self, pull: Mapping[str, Tensor]) -> None:
        """Add the ranks' gradients up, and what all lanes said together."""
        ((_, own),) = self._leaves
        self._leaves.clear()
        reached = [at for at, gradient in enumerate(own) if gradient is not None]
        if self.ranks.group is not None and reached:
            flat = self._over_ranks(torch.cat([g.flatten() for g in own if g is not None]))
            sizes = [self._parameters[at].numel() for at in reached]
            for at, part in zip(reached, flat.split(sizes), strict=True):
                own[at] = part.view_as(self._parameters[at])
        for parameter, gradient in zip(self._parameters, own, strict=True):
            parameter.grad = gradient
        for name, parameter in self.pretrainer.coupled_parameters():
            if name in pull:
                parameter.grad = _plus(parameter.grad, pull[name])

    def add_up(
        self, together: Sequence[Mapping[str, Terms]], apart: Sequence[Mapping[str, Terms]]
    ) -> dict[str, Tensor]:
        """Sums by name: what lanes said together is known to all; the rest is added lane by lane."""
        whole = {at: value.double() for at, value in add_terms(together).items()}
        each = [add_terms([terms]) for terms in apart]
        names = list(dict.fromkeys(name for one in each for name in one))
        if names:
            nothing = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
            rows = torch.stack([torch.stack([one.get(n, nothing).double() for n in names]) for one in each])
            total = self.ranks.gather(rows.flatten()).view(-1, len(names)).sum(0)
            whole |= {at: whole.get(at, nothing) + value for at, value in zip(names, total, strict=True)}
        return whole

    def _over_ranks(self, flat: Tensor) -> Tensor:
        """(P,) of each rank -> (P,) their sum, in a tree over the ranks."""
        world = self.ranks.world
        size = -(-len(flat) // world)
        mine = torch.nn.functional.pad(flat, (0, size * world - len(flat)))
        parts = torch.empty_like(mine)
        dist.all_to_all_single(parts, mine, group=self.ranks.group)
        rows = list(parts.view(world, size).unbind())
        while len(rows) > 1:
            rows = [one + other for one, other in zip(rows[::2], rows[1::2], strict=True)]
        dist.all_gather_into_tensor(mine, rows[0], group=self.ranks.group)
        return mine[: len(flat)]


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other
