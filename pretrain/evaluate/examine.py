"""Every measure that a data set and a model allow, or those that were asked for."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, get_args

from datasets.errors import UserError
from datasets.source import Source
from pretrain.distributed import Ranks
from pretrain.evaluate.caption import caption_metrics
from pretrain.evaluate.judge import Judge
from pretrain.evaluate.observe import Observed, observe
from pretrain.evaluate.probe import linear_probe, nearest_neighbours
from pretrain.evaluate.results import Result, Results
from pretrain.evaluate.retrieval import recalls
from pretrain.evaluate.zero_shot import (
    Classes,
    accuracy,
    class_embeddings,
    default_templates,
    label_indices,
)

Measure = Literal["zero_shot", "retrieval", "captions", "perplexity", "linear_probe", "nearest_neighbours"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
_GLANCE = 8
"""Samples that are looked at to tell what a data set holds."""


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
    notes: list[str] = field(default_factory=list[str])
    """What was left out, and why."""


def examine(judge: Judge, examination: Examination, *, ranks: Ranks) -> Results:
    """Measure.

    Raises:
        UserError: something was asked for that the data or the model do not allow, or nothing is possible.
    """
    measures = possible(judge, examination)
    source, resolution = examination.source, examination.resolution
    seen = observe(
        judge,
        source,
        resolution=resolution,
        ranks=ranks,
        limit=examination.limit,
        write="captions" in measures,
    )
    if seen.masked:
        examination.notes.append(f"{seen.masked} samples of {source.name} cannot be read and are left out")
    results: Results = {}
    if "zero_shot" in measures:
        results |= _zero_shot(judge, seen, examination)
    if "retrieval" in measures:
        results |= retrieval(seen, ranks)
    if "captions" in measures:
        assert seen.said is not None
        results |= {name: Result(value=value) for name, value in captions(seen).items()}
    if "perplexity" in measures:
        results["perplexity"] = Result(value=math.exp(seen.loss / max(seen.tokens, 1)))
    if {"linear_probe", "nearest_neighbours"} & measures:
        assert examination.train is not None
        train = observe(judge, examination.train, resolution=resolution, ranks=ranks, write=False)
        results |= _probes(train, seen, examination, measures)
    return results


def retrieval(seen: Observed, ranks: Ranks) -> Results:
    """Recall at 1, 5 and 10 in both directions."""
    assert seen.texts is not None
    found = recalls(seen.features, seen.texts, owner=seen.owner, text_id=seen.text_id, ranks=ranks)
    return {
        name: Result(value=value, chance=min(1.0, int(name.rpartition("@")[2]) / len(seen.keys)))
        for name, value in found.items()
    }


def captions(seen: Observed) -> dict[str, float]:
    """CIDEr-D, BLEU and ROUGE-L of the generated captions; images without a reference are left out."""
    assert seen.said is not None
    pairs = [(said, right) for said, right in zip(seen.said, seen.references, strict=True) if right]
    return caption_metrics([said for said, _ in pairs], [right for _, right in pairs])


def possible(judge: Judge, examination: Examination) -> set[Measure]:
    """The measures to make: those asked for, or all for which nothing is missing.

    Raises:
        UserError: one that was asked for is impossible, or all are; says why.
    """
    lacking = _lacking(judge, examination)
    if examination.measures:
        for measure in examination.measures:
            if measure in lacking:
                raise UserError(f"{measure} cannot be measured: {lacking[measure]}")
        return set(examination.measures)
    there = set(MEASURES) - lacking.keys()
    if not there:
        raise UserError("nothing can be measured: " + "; ".join(sorted(set(lacking.values()))))
    return there


def _lacking(judge: Judge, examination: Examination) -> dict[Measure, str]:
    """Why a measure is impossible, for those that are."""
    source, train = examination.source, examination.train
    indices = range(min(_GLANCE, examination.limit or _GLANCE, source.size or _GLANCE))
    glance = [source.read(i, seed=(0, 0, i), resolution=8, train=False) for i in indices]
    labels = [sample.label for sample in glance if sample.label is not None]
    # What only repeats the name of its class is no caption.
    described = any(set(sample.captions) - {str(sample.label)} for sample in glance)
    lacking: dict[Measure, str] = {}

    def need(condition: object, reason: str, *measures: Measure) -> None:
        if not condition:
            lacking.update({measure: reason for measure in measures if measure not in lacking})

    need(labels, f"{source.name} holds no class labels", "zero_shot", "linear_probe", "nearest_neighbours")
    need(described, f"{source.name} holds no captions", "retrieval", "captions", "perplexity")
    need(judge.embeds, "this model has no text tower", "zero_shot", "retrieval")
    need(judge.writes, "this model writes no captions", "captions", "perplexity")
    need(train, "there are no labelled images to learn from: name them by --train", *MEASURES[-2:])
    named = examination.classes is not None or all(isinstance(label, str) for label in labels)
    need(named, f"the labels of {source.name} are numbers: name the classes by --classes", "zero_shot")
    return lacking


def _zero_shot(judge: Judge, seen: Observed, examination: Examination) -> Results:
    classes = examination.classes or _own_classes(seen, templates=default_templates())
    labels = label_indices(seen.labels, classes, where=examination.source.name)
    found = accuracy(seen.features, class_embeddings(judge.sentences, classes), labels)
    return {
        name: Result(value=value, chance=int(name.removeprefix("zero_shot_top")) / len(classes.names))
        for name, value in found.items()
    }


def _probes(
    train: Observed, seen: Observed, examination: Examination, measures: Collection[Measure]
) -> Results:
    assert examination.train is not None
    classes = examination.classes or _own_classes(train, seen)
    learned = label_indices(train.labels, classes, where=examination.train.name)
    right = label_indices(seen.labels, classes, where=examination.source.name)
    chance = 1 / len(classes.names)
    results: Results = {}
    if "linear_probe" in measures:
        value = linear_probe(train.features, learned, seen.features, right)
        results["linear_probe"] = Result(value=value, chance=chance)
    if "nearest_neighbours" in measures:
        some = learned >= 0
        near = nearest_neighbours(train.features[some], learned[some], seen.features)
        value = (near == right)[right >= 0].double().mean().item()
        results["nearest_neighbours"] = Result(value=value, chance=chance)
    return results


def _own_classes(*observed: Observed, templates: tuple[str, ...] = ()) -> Classes:
    """The classes that the labels name, in order; numbers stand for themselves."""
    labels = {label for seen in observed for label in seen.labels if label is not None}
    numbers = [label for label in labels if isinstance(label, int)]
    names = [str(number) for number in range(max(numbers) + 1)] if numbers else sorted(map(str, labels))
    return Classes(tuple(names), templates, source="its own labels")
