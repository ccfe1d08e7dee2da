"""Image-text retrieval: is one of an image's texts among the k nearest, and the other way round?

B images, N texts, D embedding width, U different captions, Q queries, A answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from objectives.contrast import similarity
from pretrain.distributed import Ranks

KS = (1, 5, 10)
_QUERIES = 1024
_SCORES = 1 << 26
"""At most this many queries, and about this many similarities (256 MiB), are looked at together."""


def recalls(
    images: Tensor, texts: Tensor, *, owner: Tensor, text_id: Tensor, ranks: Ranks | None = None
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions, as CLIP counts it: any right answer is a hit.

    An answer is right when it belongs to the query, or when its caption equals that of one that does. An
    image without texts is no query, but it is an answer. Where there are fewer than k answers, all are
    looked at.

    Args:
        images: (B, D) unit embeddings, of at least one image.
        texts: (N, D) unit embeddings, of at least one text.
        owner: (N,) the image of each text.
        text_id: (N,) equal for equal captions.
        ranks: share the queries among these, of which every one holds everything above. The blocks of
            queries are the same on any number of ranks, and so are the values, to the bit.
    """
    assert len(images) > 0, "retrieval needs an image"
    assert len(texts) > 0, "retrieval needs a text"
    right = Right.of(owner, text_id)
    asking = owner.unique()
    image_to_text = _hits(
        images[asking], texts, lambda rows, found: right(asking[rows, None], found), ranks=ranks
    )
    every = torch.arange(len(texts), device=texts.device)
    text_to_image = _hits(texts, images, lambda rows, found: right(found, every[rows, None]), ranks=ranks)
    hits = torch.stack([image_to_text, text_to_image])
    if ranks is not None:
        hits = ranks.sum(hits.to(ranks.device))
    to_text, to_image = hits.tolist()
    return {
        **{f"image_to_text_recall@{k}": hit / len(asking) for k, hit in zip(KS, to_text, strict=True)},
        **{f"text_to_image_recall@{k}": hit / len(texts) for k, hit in zip(KS, to_image, strict=True)},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Right:
    """Which texts are right answers to which images, and the other way round."""

    caption: Tensor
    """(N,) 0..U-1, equal for equal captions."""
    different: int
    """U"""
    said: Tensor
    """Sorted numbers of (image, caption) that are right: a table of B x U would not fit."""

    @classmethod
    def of(cls, owner: Tensor, text_id: Tensor) -> Right:
        """Of (N,) owners and identities, as `recalls` takes them."""
        caption = text_id.unique(return_inverse=True)[1]
        different = int(caption.max()) + 1
        return cls(caption=caption, different=different, said=(owner * different + caption).unique())

    def __call__(self, image: Tensor, text: Tensor) -> Tensor:
        """Bool, of numbers of images and of texts that broadcast together."""
        pair = image * self.different + self.caption[text]
        return self.said[torch.searchsorted(self.said, pair).clamp(max=len(self.said) - 1)] == pair


def nearest(queries: Tensor, answers: Tensor, *, count: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The answers that are most alike each query, nearest first, on every rank.

    Args:
        queries: (Q, D).
        answers: (A, D).
        count: how many, or all A where there are fewer.
        ranks: share the queries, in the blocks of `recalls`.

    Returns:
        (Q, count) similarities, and (Q, count) int64 numbers of the answers.
    """
    count = min(count, len(answers))
    alike = torch.zeros(len(queries), count, device=ranks.device)
    found = torch.zeros(len(queries), count, dtype=torch.int64, device=ranks.device)
    for rows in blocks(len(queries), len(answers))[ranks.rank :: ranks.world]:
        near = similarity(queries[rows], answers).topk(count, dim=1)
        alike[rows], found[rows] = near.values.to(ranks.device), near.indices.to(ranks.device)
    # Whose rows they are not adds zeros, which changes no bit.
    return ranks.sum(alike).cpu(), ranks.sum(found).cpu()


def _hits(
    queries: Tensor, answers: Tensor, right: Callable[[slice, Tensor], Tensor], *, ranks: Ranks | None
) -> Tensor:
    """(len(KS),) int64: how many of this rank's queries find a right answer among the k nearest.

    Args:
        queries: (Q, D).
        answers: (A, D).
        right: (q, n) bool: which of the answers (q, n) are right for the queries in these q rows.
        ranks: whose share of the queries to take; None takes all.
    """
    hits = torch.zeros(len(KS), dtype=torch.int64, device=queries.device)
    shared = blocks(len(queries), len(answers))
    for rows in shared[ranks.rank :: ranks.world] if ranks else shared:
        nearest = similarity(queries[rows], answers).topk(min(max(KS), len(answers)), dim=1).indices
        hit = right(rows, nearest)
        hits += torch.stack([hit[:, :k].any(1).sum() for k in KS])
    return hits


def blocks(queries: int, answers: int) -> list[slice]:
    """The rows of all queries, few enough at a time that their similarities to all answers fit in memory."""
    size = max(1, min(_QUERIES, _SCORES // answers))
    return [slice(start, start + size) for start in range(0, queries, size)]
