"""Every measure that a data set and a model allow, or those that were asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace

from datasets.classes import Classes, default_templates
from datasets.errors import UserError
from pretrain.distributed import Ranks
from pretrain.evaluate.caption import caption_metrics
from pretrain.evaluate.judge import Judge
from pretrain.evaluate.observe import Observed, observe
from pretrain.evaluate.possible import Examination, Measure, plan
from pretrain.evaluate.probe import linear_probe, nearest_neighbours
from pretrain.evaluate.rerank import reranked
from pretrain.evaluate.results import Result, Results
from pretrain.evaluate.retrieval import recalls
from pretrain.evaluate.zero_shot import (
    accuracy,
    class_embeddings,
    label_indices,
)


def examine(judge: Judge, examination: Examination, *, ranks: Ranks, note: Callable[[str], None]) -> Results:
    """Measure.

    Args:
        judge: the model.
        examination: what to measure and on what.
        ranks: those that share the work; each gets the results.
        note: takes a sentence where samples had to be left out.

    Raises:
        UserError: something was asked for that the data or the model do not allow, or nothing is possible.
    """
    measures = plan(judge, examination).measures
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
        note(f"{seen.masked} samples of {source.name} cannot be read and are left out")
    results: Results = {}
    if "zero_shot" in measures:
        results |= _zero_shot(judge, seen, examination)
    if "retrieval" in measures:
        results |= retrieval(seen, ranks)
        if judge.matches:
            limit = examination.limit
            results |= reranked(judge, source, seen, resolution=resolution, limit=limit, ranks=ranks)
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


def _zero_shot(judge: Judge, seen: Observed, examination: Examination) -> Results:
    classes = examination.classes or Classes(_names(seen), default_templates())
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
    if examination.classes is None:  # numbers are names as well
        classes = Classes(_names(train, seen), ())
        train, seen = _spelled(train), _spelled(seen)
    else:
        classes = examination.classes
    learned = label_indices(train.labels, classes, where=examination.train.name)
    right = label_indices(seen.labels, classes, where=examination.source.name)
    if len(learned[learned >= 0].unique()) < 2:
        raise UserError(
            f"{examination.train.name} holds fewer than two classes: a probe has nothing to learn"
        )
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


def _names(*observed: Observed) -> tuple[str, ...]:
    """The classes that the labels are, in order."""
    return tuple(sorted({str(label) for seen in observed for label in seen.labels if label is not None}))


def _spelled(seen: Observed) -> Observed:
    labels = tuple(None if label is None else str(label) for label in seen.labels)
    return replace(seen, labels=labels)
