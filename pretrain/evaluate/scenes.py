"""The built-in scenes' own examination: zero-shot on every combination, retrieval, captions word for word."""

from __future__ import annotations

from typing import Literal

import torch

from datasets.scenes import COMBINATIONS, SEEN, UNSEEN, Scenes, prompts
from pretrain.distributed import Ranks
from pretrain.evaluate.caption import exact_match
from pretrain.evaluate.examine import retrieval
from pretrain.evaluate.judge import Judge
from pretrain.evaluate.observe import observe
from pretrain.evaluate.rerank import reranked
from pretrain.evaluate.results import Result, Results
from pretrain.evaluate.zero_shot import best_prompt, top1

_RETRIEVAL = 500
_PER_COMBINATION = 20
_CAPTIONED = 400


def examine_scenes(judge: Judge, *, resolution: int, ranks: Ranks) -> Results:
    """Everything the fixed test scenes can tell of a model."""
    results: Results = {}
    if judge.embeds:
        results |= _zero_shot(judge, resolution, ranks)
        pairs = Scenes(split="test", size=_RETRIEVAL, distinct=True)
        seen = observe(judge, pairs, resolution=resolution, ranks=ranks, write=False)
        results |= retrieval(seen, ranks)
        if judge.matches:
            results |= reranked(judge, pairs, seen, resolution=resolution, limit=None, ranks=ranks)
    if judge.writes:
        results |= {
            "exact_captions_1_object": _captions(judge, resolution, ranks, 1, "seen"),
            "exact_captions_2_objects": _captions(judge, resolution, ranks, 2, "seen"),
            "exact_captions_1_unseen_object": _captions(judge, resolution, ranks, 1, "unseen"),
        }
    return results


def _zero_shot(judge: Judge, resolution: int, ranks: Ranks) -> Results:
    count = _PER_COMBINATION * len(COMBINATIONS)
    scenes = Scenes(split="test", size=count, counts=(1,), combinations="all")
    seen = observe(judge, scenes, resolution=resolution, ranks=ranks, write=False)
    alternatives = [prompts(label) for label in range(len(COMBINATIONS))]
    texts = judge.sentences([prompt for each in alternatives for prompt in each])
    owner = torch.tensor([label for label, each in enumerate(alternatives) for _ in each])
    predicted = best_prompt(seen.features, texts, owner=owner)
    labels = torch.tensor([scenes.label(index) for index in range(count)])
    chance = 1 / len(COMBINATIONS)
    return {
        "zero_shot_seen_combinations": Result(value=top1(predicted, labels, SEEN), chance=chance),
        "zero_shot_unseen_combinations": Result(value=top1(predicted, labels, UNSEEN), chance=chance),
    }


def _captions(
    judge: Judge, resolution: int, ranks: Ranks, objects: int, combinations: Literal["seen", "unseen"]
) -> Result:
    scenes = Scenes(split="test", size=_CAPTIONED, counts=(objects,), combinations=combinations)
    seen = observe(judge, scenes, resolution=resolution, ranks=ranks)
    assert seen.said is not None
    return Result(value=exact_match(seen.said, seen.references))
