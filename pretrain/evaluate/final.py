"""What is measured at the end of a run: on scenes all they can tell, on other data retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from datasets.loader import evaluation_batches
from datasets.scenes import COMBINATIONS, SEEN, UNSEEN, Scenes, prompts
from datasets.source import Source
from pretrain.evaluate.caption import exact_match
from pretrain.evaluate.judge import Judge
from pretrain.evaluate.retrieval import retrieval
from pretrain.evaluate.zero_shot import predict, top1

_BATCH = 256
_RETRIEVAL = 500
_PER_COMBINATION = 20
_CAPTIONED = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measured value."""

    value: float
    chance: float | None = None
    """What guessing would get, where that is known."""


Results = dict[str, Result]


def judge_scenes(judge: Judge, *, resolution: int) -> Results:
    """Zero-shot, retrieval and captions on the fixed test scenes, as far as the model can."""
    results: Results = {}
    if judge.model.text is not None:
        results |= _scenes_zero_shot(judge, resolution)
        pairs = Scenes(split="test", size=_RETRIEVAL, distinct=True)
        results |= judge_pairs(judge, pairs, resolution=resolution)
    if judge.model.captioner is not None:
        results |= {
            "exact_captions_1_object": _scenes_captions(judge, resolution, 1, "seen"),
            "exact_captions_2_objects": _scenes_captions(judge, resolution, 2, "seen"),
            "exact_captions_1_unseen_object": _scenes_captions(judge, resolution, 1, "unseen"),
        }
    return results


def judge_pairs(judge: Judge, source: Source, *, resolution: int) -> Results:
    """Retrieval over all pairs of a finite source."""
    assert source.size is not None
    batches = evaluation_batches(source, judge.tokenizer, batch=_BATCH, resolution=resolution)
    found = retrieval(judge, batches)
    return {
        name: Result(value=value, chance=min(1.0, int(name.rpartition("@")[2]) / source.size))
        for name, value in found.items()
    }


def _scenes_zero_shot(judge: Judge, resolution: int) -> Results:
    count = _PER_COMBINATION * len(COMBINATIONS)
    scenes = Scenes(split="test", size=count, counts=(1,), combinations="all")
    batches = evaluation_batches(scenes, judge.tokenizer, batch=_BATCH, resolution=resolution)
    predicted = predict(judge, batches, [prompts(label) for label in range(len(COMBINATIONS))])
    labels = torch.tensor([scenes.label(index) for index in range(count)])
    chance = 1 / len(COMBINATIONS)
    return {
        "zero_shot_seen_combinations": Result(value=top1(predicted, labels, SEEN), chance=chance),
        "zero_shot_unseen_combinations": Result(value=top1(predicted, labels, UNSEEN), chance=chance),
    }


def _scenes_captions(
    judge: Judge, resolution: int, objects: int, combinations: Literal["seen", "unseen"]
) -> Result:
    scenes = Scenes(split="test", size=_CAPTIONED, counts=(objects,), combinations=combinations)
    said: list[str] = []
    for batch in evaluation_batches(scenes, judge.tokenizer, batch=_BATCH, resolution=resolution):
        said += judge.captions(batch)
    return Result(value=exact_match(said, [scenes.captions(index) for index in range(_CAPTIONED)]))


def table(results: Mapping[str, Result]) -> Sequence[str]:
    """One line per value, aligned."""
    width = max(map(len, results))
    return [
        f"  {name:<{width}}  {result.value:6.3f}"
        + (f"   (chance {result.chance:.3f})" if result.chance is not None else "")
        for name, result in results.items()
    ]
