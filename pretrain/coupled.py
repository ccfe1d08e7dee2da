"""What micro-batches whose samples see each other say together, before each of them is pushed through alone.

The coupled objectives see the encodings of all micro-batches at once, taken without gradient; the gradients
that they give there are later pushed through the encoders micro-batch by micro-batch (GradCache, arXiv
2101.06983). Objectives that draw pairs out of the whole batch do so here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from datasets.batch import Batch
from objectives.base import Pairs, Pass, Terms
from pretrain.parallel import Wrapped
from pretrain.precision import Compute
from pretrain.pretrainer import Coupling, Pretrainer, join
from pretrain.sums import accumulate

Pool = Literal["source", "all"]
"""Whose samples are contrasted: those of one source, or of all that feed the objective."""


@dataclass(frozen=True, slots=True)
class Circle:
    """Micro-batches whose samples see each other, and the objectives through which they do."""

    names: tuple[str, ...]
    places: tuple[int, ...]


def circles(pretrainer: Pretrainer, batches: Sequence[Batch], pool: Pool, *, least: int = 2) -> list[Circle]:
    """The circles of `least` micro-batches or more: those of one source, or of all that feed an objective."""
    members: dict[tuple[int, ...], list[str]] = {}
    for name, objective in pretrainer.objectives.items():
        if not objective.couples:
            continue
        fed = [at for at, batch in enumerate(batches) if name in pretrainer.fed_by(batch.source)]
        apart: dict[str, list[int]] = {}
        for at in fed:
            apart.setdefault(batches[at].source if pool == "source" else "", []).append(at)
        for places in apart.values():
            if len(places) >= least:
                members.setdefault(tuple(places), []).append(name)
    return [Circle(tuple(names), places) for places, names in members.items()]


@dataclass(slots=True)
class Said:
    """What the circles of a step said, for each micro-batch."""

    terms: list[dict[str, Terms]]
    """Of each circle, the raw sums by objective."""
    done: list[set[str]]
    """Of each micro-batch, the objectives of which everything is said."""
    gradients: list[dict[Pass, Tensor]]
    """Of each micro-batch, at its encodings."""
    pairs: list[dict[str, Pairs]]
    """Of each micro-batch, what the objectives that draw have drawn."""
    pull: dict[str, Tensor] = field(default_factory=dict)
    """At parameters of their own, by name."""


@torch.no_grad()
def couple(
    wrapped: Wrapped,
    batches: Sequence[Batch],
    factors: Mapping[str, Tensor],
    *,
    compute: Compute,
    key: tuple[int, ...],
    pool: Pool,
) -> Said:
    """Encode the micro-batches of every circle, and let its objectives speak.

    Args:
        wrapped: the pretrainer.
        batches: this rank's micro-batches.
        factors: () weight / global count of each objective.
        compute: precision and kernels.
        key: of the step; dropout and its like are keyed by it and the micro-batch.
        pool: whose samples are contrasted.
    """
    said = Said([], [set() for _ in batches], [{} for _ in batches], [{} for _ in batches])
    together = circles(wrapped.pretrainer, batches, pool, least=1 if wrapped.always_circles else 2)
    pieces: list[dict[Pass, Tensor]] = [{} for _ in batches]
    for place, batch in enumerate(batches):
        names = [name for circle in together if place in circle.places for name in circle.names]
        if wrapped.pretrainer.coupled(names):
            with compute.forward():
                pieces[place] = wrapped(
                    batch,
                    phase="encode",
                    names=names,
                    factors=factors,
                    key=key,
                    piece=wrapped.piece(place, len(batches)),
                )
    for circle in together:
        given = {
            wanted: torch.cat([pieces[place][wanted] for place in circle.places])
            for wanted in wrapped.pretrainer.coupled(circle.names)
        }
        seen = wrapped.circled(given, join([batches[place] for place in circle.places]))
        with compute.forward():
            coupling = wrapped(
                seen.batch, phase="couple", names=circle.names, factors=factors, key=key, given=seen.given
            )
        _share_out(coupling, circle, batches, said, images=seen.first_image, texts=seen.first_text)
    return said


def _share_out(
    coupling: Coupling, circle: Circle, batches: Sequence[Batch], said: Said, *, images: int, texts: int
) -> None:
    """Give each micro-batch its part of what its circle said; the first one's rows begin there."""
    said.terms.append(coupling.terms)
    for name, gradient in coupling.pull.items():
        accumulate(said.pull, name, gradient)
    for place in circle.places:
        batch = batches[place]
        next_image, next_text = images + len(batch.images), texts + len(batch.tokens)
        rows = {"image": slice(images, next_image), "text": slice(texts, next_text)}
        said.done[place] |= coupling.terms.keys()
        for wanted, gradient in coupling.gradients.items():
            accumulate(said.gradients[place], wanted, gradient[rows[wanted.run[0]]])
        for name, pairs in coupling.pairs.items():
            said.pairs[place][name] = pairs.of_images(images, next_image)
        images, texts = next_image, next_text
