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

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from datasets.batch import Batch
from objectives.base import Pass
from pretrain.distributed import Ranks
from pretrain.precision import Compute
from pretrain.pretrainer import Outcome, Pretrainer, join

Wrapped = Pretrainer | DistributedDataParallel


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
    """
    pretrainer = _inside(wrapped)
    for objective in pretrainer.objectives.values():
        objective.before(step)
    optimizer.zero_grad(set_to_none=True)
    factors = {name: weights[name] * ranks.world / count.clamp(min=1) for name, count in counts.items()}
    sums = backward(wrapped, batches, factors, compute=compute, seed=(seed, step, ranks.rank))
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
    a step on every rank, so that all of them save at the same step.
    """
    objectives = _inside(wrapped).objectives
    local = [torch.stack([o.denominator(batch) for batch in batches]).sum() for o in objectives.values()]
    extra = torch.tensor([float(stop), float(masked)], dtype=torch.float64, device=ranks.device)
    total = ranks.sum(torch.cat([torch.stack(local).double(), extra]))
    if ranks.group is not None:
        stop, masked = bool(total[-2] > 0), int(total[-1])
    return Agreed(counts=dict(zip(objectives, total.unbind(), strict=False)), stop=stop, masked=masked)


def backward(
    wrapped: Wrapped,
    batches: Sequence[Batch],
    factors: Mapping[str, Tensor],
    *,
    compute: Compute,
    seed: tuple[int, ...],
) -> dict[str, Tensor]:
    """Add the whole step's gradient to `.grad`; returns the raw local sums by name.

    One micro-batch, or none coupled: each is the whole truth about itself. Otherwise the coupled
    objectives see all micro-batches' encodings at once, and the gradients they give are pushed through the
    encoders micro-batch by micro-batch (GradCache, arXiv 2101.06983).
    """
    pretrainer = _inside(wrapped)
    two_pass = len(batches) > 1 and bool(pretrainer.coupled)
    sums: dict[str, Tensor] = {}
    middle = _couple(wrapped, batches, factors, compute=compute, seed=seed) if two_pass else None
    if middle is not None:
        _add(sums, middle.outcome)
    for place, batch in enumerate(batches):
        last = place == len(batches) - 1
        with _synchronised(wrapped, last), compute.forward():
            outcome = wrapped(
                batch,
                phase="push" if middle else "whole",
                factors=factors,
                seed=(*seed, place),
                given=middle.gradients[place] if middle else None,
                pull=middle.pull if middle and last else None,
            )
        with _synchronised(wrapped, last):
            outcome.total.backward()
        _add(sums, outcome)
    return sums


@dataclass(slots=True)
class _Middle:
    """What coupled objectives said about the whole step."""

    outcome: Outcome
    gradients: list[dict[Pass, Tensor]]
    pull: dict[str, Tensor]


def _couple(
    wrapped: Wrapped,
    batches: Sequence[Batch],
    factors: Mapping[str, Tensor],
    *,
    compute: Compute,
    seed: tuple[int, ...],
) -> _Middle:
    """Encode without gradient, then take the coupled losses' gradients at the encodings."""
    pieces: list[dict[Pass, Tensor]] = []
    with torch.no_grad():
        for place, batch in enumerate(batches):
            with compute.forward():
                pieces.append(wrapped(batch, phase="encode", factors=factors, seed=(*seed, place)))
    leaves = {wanted: torch.cat([piece[wanted] for piece in pieces]).requires_grad_() for wanted in pieces[0]}
    own = _inside(wrapped).coupled_parameters()
    with _synchronised(wrapped, False), compute.forward():
        outcome = wrapped(join(batches), phase="couple", factors=factors, seed=seed, given=leaves)
    found = torch.autograd.grad(
        outcome.total, [*leaves.values(), *(parameter for _, parameter in own)], allow_unused=True
    )
    by_pass = dict(zip(leaves, found, strict=False))
    gradients: list[dict[Pass, Tensor]] = [{} for _ in pieces]
    for wanted, gradient in by_pass.items():
        rows = [len(piece[wanted]) for piece in pieces]
        for mine, part in zip(gradients, gradient.split(rows), strict=True):
            mine[wanted] = part
    pull = {name: g for (name, _), g in zip(own, found[len(leaves) :], strict=True) if g is not None}
    return _Middle(outcome, gradients, pull)


def _inside(wrapped: Wrapped) -> Pretrainer:
    return wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped


def _synchronised(wrapped: Wrapped, now: bool) -> AbstractContextManager[None]:
    """Ranks exchange gradients on the last micro-batch only; the sum is the same."""
    if isinstance(wrapped, DistributedDataParallel) and not now:
        return wrapped.no_sync()
    return nullcontext()


def _add(sums: dict[str, Tensor], outcome: Outcome) -> None:
    for name, terms in outcome.terms.items():
        named = {f"{name}/{key}": value for key, value in terms.metrics.items()}
        for at, value in {f"loss/{name}": terms.total, **named}.items():
            sums[at] = sums[at] + value.detach() if at in sums else value.detach()


def _means(
    sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], weights: Mapping[str, float], ranks: Ranks
) -> dict[str, Tensor]:
    """Global means of what each rank summed, and the weighted total."""
    total = ranks.sum(torch.stack([value.double() for value in sums.values()]))
    named = dict(zip(sums, total.unbind(), strict=True))
    means: dict[str, Tensor] = {}
    for at, value in named.items():
        name = at.removeprefix("loss/") if at.startswith("loss/") else at.partition("/")[0]
        means[at] = value / counts[name].clamp(min=1)
    loss = torch.stack([weights[name] * means[f"loss/{name}"] for name in counts]).sum()
    return {"loss": loss, **means}
