"""One optimizer step: count the units, run the micro-batches, clip, step.

The gradient is that of the mean over the global batch, whatever the number of ranks and micro-batches:
counts are added over all of them before the first backward, forwards return sums, and the wrapper's mean
over ranks is undone by a factor of their number.

W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from datasets.batch import Batch
from objectives.base import Pass
from pretrain.distributed import Ranks
from pretrain.precision import Compute
from pretrain.pretrainer import Outcome, Pretrainer, join

Wrapped = Pretrainer | DistributedDataParallel
Pool = Literal["source", "all"]
"""Whose samples are contrasted: those of one source, or of all that feed the objective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did. Tensors, so that nothing waits for the device."""

    values: dict[str, Tensor]
    """() global means: `loss`, and `loss/NAME` and `NAME/METRIC` of each objective."""
    norm: Tensor
    """() gradient norm before clipping."""
    norms: dict[str, Tensor]
    """() the same of each tower, and of what belongs to none (`objectives`: temperatures, heads)."""


def train_step(
    wrapped: Wrapped,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    counts: Mapping[str, Tensor],
    weights: Mapping[str, float],
    clip: float,
    compute: Compute,
    ranks: Ranks,
    seed: int,
    step: int,
    pool: Pool = "source",
) -> StepReport:
    """One step over this rank's micro-batches.

    Args:
        wrapped: the pretrainer, or its wrapper.
        batches: this rank's micro-batches.
        optimizer: its learning rates are set already.
        counts: () units of each objective over all ranks and micro-batches (`agree`).
        weights: of each objective, at this step.
        clip: the largest gradient norm, 0 for none.
        compute: precision and kernels.
        ranks: who we are.
        seed: of the run; with the step, the key of dropout and its like.
        step: optimizer steps done before this one.
        pool: whose samples are contrasted.
    """
    pretrainer = _inside(wrapped)
    for objective in pretrainer.objectives.values():
        objective.before(step)
    optimizer.zero_grad(set_to_none=True)
    factors = {name: weights[name] * ranks.world / count.clamp(min=1) for name, count in counts.items()}
    seed_here = (seed, step, ranks.rank)
    sums = backward(wrapped, batches, factors, compute=compute, seed=seed_here, pool=pool)
    norm, norms = _clip(pretrainer, clip)
    optimizer.step()
    pretrainer.clamp()
    for objective in pretrainer.objectives.values():
        objective.commit()
    return StepReport(values=_means(sums, counts, weights, ranks), norm=norm, norms=norms)


def _clip(pretrainer: Pretrainer, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Clip the gradient to a norm of `clip` (0: not at all); its norm before, whole and by tower."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in pretrainer.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(_tower_of(name), []).append(parameter.grad)
    norms = {tower: torch.nn.utils.get_total_norm(gradients) for tower, gradients in parts.items()}
    norm = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    torch.nn.utils.clip_grads_with_norm_(pretrainer.parameters(), clip or torch.inf, norm, foreach=True)
    return norm, norms


def _tower_of(parameter: str) -> str:
    """`model.image.trunk.norm.weight` is the image tower's; a temperature is no tower's."""
    _, part, *inside = parameter.split(".")
    return part if parameter.startswith("model.") and inside else "objectives"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What all ranks know before they begin a step."""

    counts: dict[str, Tensor]
    """() units of each objective over all ranks and micro-batches."""
    stop: bool
    """Whether any rank was asked to stop."""
    masked: int
    """Samples of this step that could not be read, on all ranks."""


def agree(wrapped: Wrapped, batches: Sequence[Batch], ranks: Ranks, *, stop: bool, masked: int) -> Agreed:
    """Add up the units of each objective, and with them whatever else all ranks must act on together.

    One all-reduce, before the first backward. A signal to stop travels here because this sum happens once
    a step on every rank, so that all of them save at the same step. Sources that feed one objective pool
    into one mean.
    """
    pretrainer = _inside(wrapped)
    local = dict.fromkeys(pretrainer.objectives, torch.zeros((), dtype=torch.float64, device=ranks.device))
    for batch in batches:
        for name in pretrainer.fed_by(batch.source):
            local[name] = local[name] + pretrainer.objectives[name].denominator(batch)
    extra = torch.tensor([float(stop), float(masked)], dtype=torch.float64, device=ranks.device)
    total = ranks.sum(torch.cat([torch.stack(list(local.values())), extra]))
    if ranks.group is not None:
        stop, masked = bool(total[-2] > 0), int(total[-1])
    return Agreed(counts=dict(zip(local, total.unbind(), strict=False)), stop=stop, masked=masked)


def backward(
    wrapped: Wrapped,
    batches: Sequence[Batch],
    factors: Mapping[str, Tensor],
    *,
    compute: Compute,
    seed: tuple[int, ...],
    pool: Pool = "source",
) -> dict[str, Tensor]:
    """Add the whole step's gradient to `.grad`; returns the raw local sums by name.

    A micro-batch that nothing couples to another is the whole truth about itself. Otherwise the coupled
    objectives see the encodings of all that are contrasted at once, and the gradients they give are pushed
    through the encoders micro-batch by micro-batch (GradCache, arXiv 2101.06983).
    """
    pretrainer = _inside(wrapped)
    circles = _circles(pretrainer, batches, pool)
    sums: dict[str, Tensor] = {}
    middle = _couple(wrapped, batches, circles, factors, compute=compute, seed=seed)
    for outcome in middle.outcomes:
        _add(sums, outcome)
    for place, batch in enumerate(batches):
        last = place == len(batches) - 1
        apart = {name for circle in circles if place in circle.places for name in circle.names}
        with _synchronised(wrapped, last), compute.forward():
            outcome = wrapped(
                batch,
                phase="push",
                names=[name for name in pretrainer.fed_by(batch.source) if name not in apart],
                factors=factors,
                seed=(*seed, place),
                given=middle.gradients[place],
                pull=middle.pull if last else None,
            )
        with _synchronised(wrapped, last):
            outcome.total.backward()
        _add(sums, outcome)
    return sums


@dataclass(frozen=True, slots=True)
class _Circle:
    """Micro-batches whose samples see each other, and the objectives through which they do."""

    names: tuple[str, ...]
    places: tuple[int, ...]


def _circles(pretrainer: Pretrainer, batches: Sequence[Batch], pool: Pool) -> list[_Circle]:
    """The circles of more than one micro-batch: those of one source, or of all that feed an objective."""
    members: dict[tuple[int, ...], list[str]] = {}
    for name, objective in pretrainer.objectives.items():
        if not objective.coupled:
            continue
        fed = [at for at, batch in enumerate(batches) if name in pretrainer.fed_by(batch.source)]
        apart: dict[str, list[int]] = {}
        for at in fed:
            apart.setdefault(batches[at].source if pool == "source" else "", []).append(at)
        for places in apart.values():
            if len(places) > 1:
                members.setdefault(tuple(places), []).append(name)
    return [_Circle(tuple(names), places) for places, names in members.items()]


@dataclass(slots=True)
class _Middle:
    """What coupled objectives said about the whole step."""

    outcomes: list[Outcome]
    gradients: list[dict[Pass, Tensor]]
    """Of each micro-batch, at its encodings."""
    pull: dict[str, Tensor]
    """At parameters of their own, by name."""


def _couple(
    wrapped: Wrapped,
    batches: Sequence[Batch],
    circles: Sequence[_Circle],
    factors: Mapping[str, Tensor],
    *,
    compute: Compute,
    seed: tuple[int, ...],
) -> _Middle:
    """Encode without gradient, then take the coupled losses' gradients at the encodings."""
    pieces: list[dict[Pass, Tensor]] = [{} for _ in batches]
    with torch.no_grad():
        for place, batch in enumerate(batches):
            names = [name for circle in circles if place in circle.places for name in circle.names]
            if names:
                with compute.forward():
                    pieces[place] = wrapped(
                        batch, phase="encode", names=names, factors=factors, seed=(*seed, place)
                    )
    middle = _Middle([], [{} for _ in batches], {})
    for circle in circles:
        _contrast(wrapped, batches, circle, pieces, factors, middle, compute=compute, seed=seed)
    return middle


def _contrast(
    wrapped: Wrapped,
    batches: Sequence[Batch],
    circle: _Circle,
    pieces: Sequence[Mapping[Pass, Tensor]],
    factors: Mapping[str, Tensor],
    middle: _Middle,
    *,
    compute: Compute,
    seed: tuple[int, ...],
) -> None:
    """Add what one circle says to the middle."""
    passes = _inside(wrapped).coupled(circle.names)
    leaves = {
        wanted: torch.cat([pieces[place][wanted] for place in circle.places]).requires_grad_()
        for wanted in passes
    }
    own = _inside(wrapped).coupled_parameters()
    together = join([batches[place] for place in circle.places])
    with _synchronised(wrapped, False), compute.forward():
        outcome = wrapped(
            together, phase="couple", names=circle.names, factors=factors, seed=seed, given=leaves
        )
    found = torch.autograd.grad(
        outcome.total, [*leaves.values(), *(parameter for _, parameter in own)], allow_unused=True
    )
    for wanted, gradient in zip(leaves, found, strict=False):
        rows = [len(pieces[place][wanted]) for place in circle.places]
        for place, part in zip(circle.places, gradient.split(rows), strict=True):
            _accumulate(middle.gradients[place], wanted, part)
    for (name, _), gradient in zip(own, found[len(leaves) :], strict=True):
        if gradient is not None:
            _accumulate(middle.pull, name, gradient)
    middle.outcomes.append(outcome)


def _inside(wrapped: Wrapped) -> Pretrainer:
    return wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped


def _synchronised(wrapped: Wrapped, now: bool) -> AbstractContextManager[None]:
    """Ranks exchange gradients on the last micro-batch only; the sum is the same."""
    if isinstance(wrapped, DistributedDataParallel) and not now:
        return wrapped.no_sync()
    return nullcontext()


_At = TypeVar("_At")


def _accumulate(sums: dict[_At, Tensor], at: _At, value: Tensor) -> None:
    sums[at] = sums[at] + value if at in sums else value


def _add(sums: dict[str, Tensor], outcome: Outcome) -> None:
    for name, terms in outcome.terms.items():
        for at, value in {"": terms.total, **terms.metrics}.items():
            _accumulate(sums, f"{name}/{at}" if at else f"loss/{name}", value.detach())


def _means(
    sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], weights: Mapping[str, float], ranks: Ranks
) -> dict[str, Tensor]:
    """Global means of what each rank summed, and the weighted total; an objective not fed has no value."""
    total = ranks.sum(torch.stack([value.double() for value in sums.values()]))
    named = dict(zip(sums, total.unbind(), strict=True))
    means: dict[str, Tensor] = {}
    for at, value in named.items():
        name = at.removeprefix("loss/") if at.startswith("loss/") else at.partition("/")[0]
        means[at] = value / counts[name].clamp(min=1)
    losses = [weights[name] * means[f"loss/{name}"] for name in counts if f"loss/{name}" in means]
    return {"loss": torch.stack(losses).sum(), **means}
