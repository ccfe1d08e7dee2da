"""Which measures a data set and a model allow, seen at a glance at the data, and why not the others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from datasets.classes import Classes
from datasets.errors import UserError
from datasets.sample import Sample
from datasets.source import Source
from pretrain.evaluate.judge import Judge
from pretrain.evaluate.zero_shot import label_indices

Measure = Literal["zero_shot", "retrieval", "captions", "perplexity", "linear_probe", "nearest_neighbours"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
_BY_LABELS: tuple[Measure, ...] = ("zero_shot", "linear_probe", "nearest_neighbours")
_PROBES: tuple[Measure, ...] = ("linear_probe", "nearest_neighbours")
_GLANCE = 32
"""Samples, spread over the set, that are looked at to tell what it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What is to be measured, and on what."""

    source: Source
    resolution: int
    measures: Collection[Measure] = ()
    """Empty for all that are possible."""
    classes: Classes | None = None
    """Of the labels; None for the names that the labels themselves are."""
    train: Source | None = None
    """What the probes learn from."""
    limit: int | None = None
    """Samples to look at."""

    @property
    def size(self) -> int:
        """Samples that are looked at."""
        return min(size for size in (self.source.size, self.limit) if size is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be measured."""

    measures: frozenset[Measure]
    left_out: tuple[str, ...]
    """Why the others will not, a sentence for each reason."""


def plan(judge: Judge, examination: Examination) -> Plan:
    """The measures to make: those asked for, or all for which nothing is missing.

    Raises:
        UserError: one that was asked for is impossible, or all are, or the classes are not those of the data.
    """
    labels, lacking = _lacking(judge, examination)
    if examination.classes is not None:
        label_indices(labels, examination.classes, where=examination.source.name)
    for measure in examination.measures or (_PROBES if examination.train else ()):
        if measure in lacking:
            raise UserError(f"{measure} cannot be measured: {lacking[measure]}")
    measures = frozenset(examination.measures) or frozenset(MEASURES) - lacking.keys()
    reasons = list(dict.fromkeys(lacking.values()))
    if not measures:
        raise UserError("nothing can be measured: " + "; ".join(reasons))
    left_out = {why: [name for name in MEASURES if lacking.get(name) == why] for why in reasons}
    return Plan(
        measures=measures,
        left_out=()
        if examination.measures
        else tuple(f"not measured: {', '.join(names)} ({why})" for why, names in left_out.items()),
    )


def _lacking(judge: Judge, examination: Examination) -> tuple[list[str | int | None], dict[Measure, str]]:
    """The labels that were seen, and why a measure is impossible, for those that are."""
    source, glance = examination.source, _glance(examination)
    labels = [sample.label for sample in glance]
    known = [label for label in labels if label is not None]
    # What only repeats the name of its class is no caption.
    described = any(set(sample.captions) - {str(sample.label)} for sample in glance)
    lacking: dict[Measure, str] = {}

    def need(condition: object, reason: str, *measures: Measure) -> None:
        if not condition:
            lacking.update({measure: reason for measure in measures if measure not in lacking})

    need(known, f"{source.name} holds no class labels", *_BY_LABELS)
    only = " but the names of its classes" if known else ""
    need(described, f"{source.name} holds no captions{only}", "retrieval", "captions", "perplexity")
    untrained = "no objective of this run compares images and texts"
    without = untrained if judge.model.text is not None else "this model has no text tower"
    need(judge.embeds, without, "zero_shot", "retrieval")
    need(judge.writes, "this model writes no captions", "captions", "perplexity")
    need(examination.train, "there are no labelled images to learn from: name them by --train", *_PROBES)
    named = examination.classes is not None or all(isinstance(label, str) for label in known)
    need(named, f"the labels of {source.name} are numbers: name the classes by --classes", "zero_shot")
    return labels, lacking


def _glance(examination: Examination) -> list[Sample]:
    """Samples spread evenly over the set, without those that cannot be read."""
    source, size = examination.source, examination.size
    indices = sorted({place * size // _GLANCE for place in range(_GLANCE)})
    samples = [source.read(i, seed=(0, 0, i), resolution=8) for i in indices]
    readable = [sample for sample in samples if not sample.fault]
    if not readable:
        raise UserError(
            f"not one of {len(samples)} samples of {source.name} can be read ({samples[0].key}: "
            f"{samples[0].fault})"
        )
    return readable
