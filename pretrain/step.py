"""One optimizer step: count the units, run the micro-batches, judge, clip, step.

The gradient is that of the mean over the global batch, whatever the number of ranks and micro-batches:
counts are added over all of them before the first backward, forwards return sums, and what the wrapper
divides by where ranks meet is undone.

W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from datasets.batch import Batch
from objectives.base import Terms
from pretrain.clipping import Norms, clip, gradient_norms
from pretrain.coupled import Pool, couple
from pretrain.distributed import Ranks
from pretrain.ema import Ema
from pretrain.faults import Fault, find_fault
from pretrain.parallel import Wrapped
from pretrain.precision import Compute

Part = Literal["forward", "backward", "optimizer", "wait"]
"""What the time of a step is spent on; `wait` is for the ranks that are not here yet."""


def _unwatched(part: Part) -> AbstractContextManager[None]:
    del part
    return nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every step works with."""

    wrapped: Wrapped
    """The pretrainer."""
    compute: Compute
    """Precision and kernels."""
    pool: Pool = "source"
    """Whose samples are contrasted."""
    watch: Callable[[Part], AbstractContextManager[None]] = _unwatched
    """Told what the time inside is spent on."""

    @property
    def ranks(self) -> Ranks:
        """Who we are."""
        return self.wrapped.ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did. Tensors, so that nothing waits for the device."""

    values: dict[str, Tensor]
    """() global means: `loss`, and `loss/NAME` and `NAME/METRIC` of each objective."""
    norms: Norms
    """Gradient norms before clipping."""
    fault: Fault | None
    """Why the step was skipped, if it was."""


def train_step(
    setup: Setup,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    counts: Mapping[str, Tensor],
    weights: Mapping[str, float],
    largest_norm: float,
    key: tuple[int, int],
    unfit: bool = False,
    ema: Ema | None = None,
) -> StepReport:
    """One step over this rank's micro-batches, or none: all ranks skip one whose numbers are not finite.

    Of a skipped step nothing stays: weights, their averages, moments and their counts of steps, momentum
    encoders and queues are as they were, to the bit.

    Args:
        setup: the pretrainer and how it is run.
        batches: this rank's micro-batches.
        optimizer: its learning rates are set already.
        counts: () units of each objective over all ranks and micro-batches (`agree`).
        weights: of each objective, at this step.
        largest_norm: what the gradient is clipped to, 0 for not at all.
        key: seed of the run, and optimizer steps done before this one.
        unfit: whether an input of any rank is not finite (`faults.is_fit`).
        ema: the averages of the weights, if there are any.
    """
    pretrainer = setup.wrapped.pretrainer
    for objective in pretrainer.objectives.values():
        objective.before(key[1])
    optimizer.zero_grad(set_to_none=True)
    divided = setup.wrapped.divided
    factors = {name: weights[name] * divided / count.clamp(min=1) for name, count in counts.items()}
    totals = backward(setup, batches, factors, key=key)
    with setup.watch("optimizer"):
        values, norms = _means(totals, counts, weights), gradient_norms(pretrainer)
        fault = find_fault(values, norms, unfit=unfit)
        if fault is None:
            clip(pretrainer, norms.whole, largest=largest_norm)
            optimizer.step()
            pretrainer.clamp()
            for objective in pretrainer.objectives.values():
                objective.commit()
            if ema is not None:
                ema.update()
    return StepReport(values=values, norms=norms, fault=fault)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What all ranks know before they begin a step."""

    counts: dict[str, Tensor]
    """() units of each objective over all ranks and micro-batches."""
    sums: dict[str, float]
    """Of whatever was asked for, over all ranks."""


def agree(setup: Setup, batches: Sequence[Batch], *, asking: Mapping[str, float] | None = None) -> Agreed:
    """Add up the units of each objective, and with them whatever else all ranks must act on together.

    One all-reduce, before the first backward. A signal to stop travels here because this sum happens once
    a step on every rank, so that all of them save at the same step. Sources that feed one objective pool
    into one mean.

    Args:
        setup: the pretrainer.
        batches: this rank's micro-batches.
        asking: this rank's part of each sum that all must know.
    """
    pretrainer, ranks, asking = setup.wrapped.pretrainer, setup.ranks, asking or {}
    local = dict.fromkeys(pretrainer.objectives, torch.zeros((), dtype=torch.float64, device=ranks.device))
    for batch in batches:
        for name in pretrainer.fed_by(batch.source):
            local[name] = local[name] + pretrainer.objectives[name].denominator(batch)
    extra = torch.tensor(list(asking.values()), dtype=torch.float64, device=ranks.device)
    mine = torch.cat([torch.stack(list(local.values())), extra])
    with setup.watch("wait"):
        total = ranks.sum(mine)
    counts = dict(zip(local, total.unbind(), strict=False))
    if ranks.group is not None:
        asking = dict(zip(asking, total[len(local) :].tolist(), strict=True))
    return Agreed(counts=counts, sums=dict(asking))


def backward(
    setup: Setup, batches: Sequence[Batch], factors: Mapping[str, Tensor], *, key: tuple[int, ...]
) -> dict[str, Tensor]:
    """Add the whole step's gradient to `.grad`; returns the raw sums over all ranks by name.

    A micro-batch that nothing couples to another is the whole truth about itself; for the others see
    `pretrain.coupled`.
    """
    wrapped, compute = setup.wrapped, setup.compute
    batches, pushed = wrapped.ordered(batches), list[Mapping[str, Terms]]()
    with setup.watch("forward"):
        said = couple(wrapped, batches, factors, compute=compute, key=key, pool=setup.pool)
    for place, batch in enumerate(batches):
        last = place == len(batches) - 1
        names = wrapped.pretrainer.fed_by(batch.source)
        with wrapped.synchronised(last):
            with setup.watch("forward"), compute.forward():
                outcome = wrapped(
                    batch,
                    phase="push",
                    names=[name for name in names if name not in said.done[place]],
                    factors=factors,
                    key=key,
                    piece=wrapped.piece(place, len(batches)),
                    given=said.gradients[place],
                    pairs=said.pairs[place],
                    pull=said.pull if last and wrapped.lends_pull else None,
                )
            if outcome.total.requires_grad:  # what this micro-batch alone says may all be frozen
                with setup.watch("backward"):
                    outcome.total.backward()
        wrapped.pushed(place, len(batches))
        pushed.append({name: terms.detached() for name, terms in outcome.terms.items()})
    wrapped.finish(said.pull)
    return wrapped.add_up(said.terms, pushed)


def _means(
    totals: Mapping[str, Tensor], counts: Mapping[str, Tensor], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """Global means of the sums, and the weighted total; an objective not fed has no value."""
    means: dict[str, Tensor] = {}
    for at, value in totals.items():
        name = at.removeprefix("loss/") if at.startswith("loss/") else at.partition("/")[0]
        means[at] = value / counts[name].clamp(min=1)
    losses = [weights[name] * means[f"loss/{name}"] for name in counts if f"loss/{name}" in means]
    return {"loss": torch.stack(losses).sum(), **means}
