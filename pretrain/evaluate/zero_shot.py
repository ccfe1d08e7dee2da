"""Zero-shot classification: the class whose prompt is nearest to the image (CLIP, arXiv 2103.00020, 3.1).

B images, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from datasets.batch import Batch
from pretrain.evaluate.judge import Judge


def predict(judge: Judge, batches: Iterable[Batch], prompts: Sequence[Sequence[str]]) -> Tensor:
    """The class of each image, (B,) int64.

    Args:
        judge: the model.
        batches: images.
        prompts: of each class, sentences that are alternatives: a class scores as its best prompt does.
    """
    texts = judge.sentences([prompt for alternatives in prompts for prompt in alternatives])
    owner = torch.tensor([c for c, alternatives in enumerate(prompts) for _ in alternatives])
    found: list[Tensor] = []
    for batch in batches:
        scores = judge.images(batch) @ texts.T
        best = scores.new_full((len(scores), len(prompts)), -torch.inf)
        best.scatter_reduce_(1, owner.expand_as(scores), scores, "amax")
        found.append(best.argmax(1))
    return torch.cat(found)


def top1(predicted: Tensor, labels: Tensor, among: Sequence[int]) -> float:
    """Share of the images of certain classes whose class was found among all classes."""
    chosen = torch.isin(labels, torch.tensor(among))
    return (predicted == labels)[chosen].double().mean().item()
