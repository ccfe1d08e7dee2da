"""What makes a step unfit to be taken: an input, a loss or a gradient that is not finite.

The answer is the same on every rank, because every rank asks numbers that are sums over all of them. A step
is judged by nothing but itself: no window of earlier losses that one NaN could poison for a hundred steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from datasets.batch import Batch
from pretrain.clipping import Norms

Kind = Literal["input", "loss", "gradient"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a step was not taken; the same on every rank."""

    unfit: bool
    """Whether a number of a batch, on any rank, is not finite."""
    objectives: tuple[str, ...]
    """Whose mean over the global batch is not finite."""
    towers: tuple[str, ...]
    """Whose gradient is not finite."""

    @property
    def kind(self) -> Kind:
        """The first that went wrong, on the way from data to gradient."""
        return "input" if self.unfit else "loss" if self.objectives else "gradient"

    def __str__(self) -> str:
        if self.unfit:
            return "its input is not finite"
        if self.objectives:
            return f"the loss of {' and '.join(self.objectives)} is not finite"
        return f"the gradient of {' and '.join(self.towers) or 'everything together'} is not finite"


def find_fault(values: Mapping[str, Tensor], norms: Norms, *, unfit: bool = False) -> Fault | None:
    """What is wrong with a step, if anything is.

    The host waits here, once a step, until the device is done with the backward: the optimizer, queues and
    momentum encoders must not begin before it is known whether they may, and an optimizer need not be one
    that could be told so on the device (fused AdamW can, Muon cannot). Several ranks wait for each other at
    the next step's `agree` in any case; that wait is shorter by this one.

    Args:
        values: () means over all ranks, of which `loss/NAME` are judged: what is only watched may be NaN.
        norms: of the gradient where ranks have met.
        unfit: whether an input of any rank is not finite.
    """
    losses = {at: value for at, value in values.items() if at.startswith("loss/")}
    judged = dict(zip(losses, torch.stack(list(losses.values())).isfinite().tolist(), strict=True))
    # Two reads, because offloaded gradients are in host memory; the second one waits for nothing.
    whole, *towers = torch.stack([norms.whole, *norms.by_tower.values()]).isfinite().tolist()
    if whole and all(judged.values()) and not unfit:
        return None
    return Fault(
        unfit=unfit,
        objectives=tuple(at.removeprefix("loss/") for at, finite in judged.items() if not finite),
        towers=tuple(tower for tower, finite in zip(norms.by_tower, towers, strict=True) if not finite),
    )


def is_fit(batch: Batch) -> bool:
    """Whether the numbers of a batch are finite: its boxes; all else are integers. For one in host memory."""
    return bool(batch.boxes.isfinite().all())
