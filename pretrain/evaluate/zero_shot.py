"""Zero-shot classification: the class whose prompts are nearest to the image (CLIP, arXiv 2103.00020, 3.1).

B images, C classes, T templates, D embedding width.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.classes import Classes, normalise_name
from datasets.errors import UserError
from objectives.contrast import similarity
from pretrain.evaluate.retrieval import blocks

_SENTENCES = 256
"""About this many prompts are encoded at a time: ImageNet has 1000 x 80."""


def class_embeddings(encode: Callable[[Sequence[str]], Tensor], classes: Classes) -> Tensor:
    """One unit embedding per class, (C, D): the mean of its prompts' unit embeddings, made unit again.

    Args:
        encode: embeddings (N, D) of N sentences; it is given a bounded number at a time.
        classes: what to embed.
    """
    prompts = classes.prompts()
    at_once = max(1, _SENTENCES // len(classes.templates))
    means: list[Tensor] = []
    for start in range(0, len(prompts), at_once):
        some = prompts[start : start + at_once]
        embeddings = F.normalize(encode([prompt for alternatives in some for prompt in alternatives]), dim=1)
        means.append(embeddings.unflatten(0, (len(some), -1)).mean(1))
    return F.normalize(torch.cat(means), dim=1)


def label_indices(labels: Sequence[str | int | None], classes: Classes, *, where: str) -> Tensor:
    """The place of each sample's class among `classes`, (B,) int64; -1 for a sample without a label.

    Args:
        labels: names, places, or None. A name is found whatever its case, and whether it is written with
            spaces, `_` or `-`; of two classes of one name (ImageNet has such) it is the first.
        classes: what they are labels of.
        where: the data they come from, for messages.

    Raises:
        UserError: no sample has a label, or one is not among the classes.
    """
    if all(label is None for label in labels):
        raise UserError(
            f"{where} holds no class labels: give data with a `class` in KEY.json or a number in KEY.cls"
        )
    places = {normalise_name(name): place for place, name in reversed(list(enumerate(classes.names)))}
    few = textwrap.shorten(", ".join(classes.names), 60, placeholder=" ...")

    def place(label: str | int | None) -> int:
        if label is None:
            return -1
        found = label if isinstance(label, int) else places.get(normalise_name(label), -1)
        if not 0 <= found < len(classes.names):
            raise UserError(
                f"{where} has the label {label!r:.80}, which is none of the {len(classes.names)} classes of "
                f"{classes.source} ({few}): give the class file that belongs to this data"
            )
        return found

    return torch.tensor([place(label) for label in labels], dtype=torch.int64)


def accuracy(images: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of images whose class is the nearest, and, of more than 5 classes, among the 5 nearest.

    Args:
        images: (B, D) unit embeddings.
        classes: (C, D) unit embeddings.
        labels: (B,) int64; images with label -1 are left out, and one at least has another.
    """
    ks = (1, 5) if len(classes) > 5 else (1,)
    images, labels = images[labels >= 0], labels[labels >= 0]
    assert len(labels) > 0, "no image has a label"
    hits = dict.fromkeys(ks, 0)
    for rows in blocks(len(images), len(classes)):
        nearest = similarity(images[rows], classes).topk(max(ks), dim=1).indices
        right = nearest == labels[rows, None]
        for k in ks:
            hits[k] += int(right[:, :k].sum())
    return {f"zero_shot_top{k}": hit / len(labels) for k, hit in hits.items()}


def best_prompt(images: Tensor, texts: Tensor, *, owner: Tensor) -> Tensor:
    """The class of each image where a class scores as its best prompt does, (B,) int64.

    Args:
        images: (B, D).
        texts: (N, D) of all classes.
        owner: (N,) the class of each text.
    """
    return owner[similarity(images, texts).argmax(1)]


def top1(predicted: Tensor, labels: Tensor, among: Sequence[int]) -> float:
    """Share of the images of certain classes whose class was found among all classes."""
    chosen = torch.isin(labels, torch.tensor(among))
    return (predicted == labels)[chosen].double().mean().item()
