"""Who made a step unfit: the samples whose own numbers, encodings or losses are not finite.

A contrast spreads the NaN of one sample over the rows of all, so the sums of a micro-batch do not tell who
began. The step's samples are therefore encoded once more, without gradient and with the same randomness, and
each is judged by its own rows, and by the loss that it has alone. That is done for a step that was skipped,
and costs about one more forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from datasets.batch import Batch
from pretrain.apart import finite_by_sample
from pretrain.faults import Fault
from pretrain.step import Setup


class Suspect(NamedTuple):
    """A sample of the step."""

    rank: int
    source: str
    key: str
    reason: str
    """What of it is not finite; empty where nothing of its own is."""

    def __str__(self) -> str:
        return f"{self.key} ({self.reason})" if self.reason else self.key


@torch.no_grad()
def find_suspects(
    setup: Setup, batches: Sequence[Batch], fault: Fault, *, key: tuple[int, ...]
) -> list[Suspect]:
    """The samples that made a step unfit, or all of it where no sample alone did; the same on every rank.

    Every rank calls it together. A gradient that is not finite though every loss is has no sample to it.

    Args:
        setup: as of the step.
        batches: this rank's micro-batches, as of the step.
        fault: what was wrong with it.
        key: of the step.
    """
    ranks, wrapped = setup.ranks, setup.wrapped
    batches = wrapped.ordered(batches)
    rounds = max(ranks.gather_objects(max((len(batch.keys) for batch in batches), default=0)))
    mine: list[Suspect] = []
    for place, batch in enumerate(batches):
        unfit = {"boxes": finite_by_sample(batch.boxes, batch, of="text")}
        names = [name for name in wrapped.pretrainer.fed_by(batch.source) if name in fault.objectives]
        if names:
            with setup.compute.forward():
                unfit |= wrapped(
                    batch,
                    phase="inspect",
                    names=names,
                    factors={},
                    key=key,
                    piece=wrapped.piece(place, len(batches)),
                    rounds=rounds,
                )
        reasons = {reason: finite.tolist() for reason, finite in unfit.items()}
        for number, name in enumerate(batch.keys):
            # The first that is not finite: what follows from it is not finite either.
            reason = next((reason for reason, finite in reasons.items() if not finite[number]), None)
            if reason is not None:
                mine.append(Suspect(ranks.rank, batch.source, name, reason))
    everyone = [one for each in ranks.gather_objects(mine) for one in each]
    if everyone:
        return everyone
    mine = [Suspect(ranks.rank, batch.source, name, "") for batch in batches for name in batch.keys]
    return [one for each in ranks.gather_objects(mine) for one in each]
