"""Image-text retrieval: is one of an image's texts among the k nearest, and the other way round?

B images, N texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from datasets.batch import Batch
from pretrain.evaluate.judge import Judge

KS = (1, 5, 10)
_CHUNK = 1024


def retrieval(judge: Judge, batches: Iterable[Batch]) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions, as CLIP counts it: any right answer is a hit.

    An answer is right when it belongs to the query, or when its caption equals that of one that does.
    Masked samples are left out.
    """
    images, texts, owners, ids = [], [], [], []
    count = 0
    for batch in batches:
        kept = batch.image_valid.nonzero().squeeze(1)
        place = torch.full((len(batch.images),), -1)
        place[kept] = torch.arange(len(kept)) + count
        images.append(judge.images(batch)[kept])
        texts.append(judge.texts(batch)[batch.pair_valid])
        owners.append(place[batch.image_index[batch.pair_valid]])
        ids.append(batch.text_id[batch.pair_valid])
        count += len(kept)
    return recalls(torch.cat(images), torch.cat(texts), owner=torch.cat(owners), text_id=torch.cat(ids))


def recalls(images: Tensor, texts: Tensor, *, owner: Tensor, text_id: Tensor) -> dict[str, float]:
    """Recall from embeddings.

    Args:
        images: (B, D).
        texts: (N, D).
        owner: (N,) the image of each text.
        text_id: (N,) equal for equal captions.
    """
    # Captions as numbers 0..U-1, and which image says which: right answers are those that share one.
    _, caption = text_id.unique(return_inverse=True)
    says = torch.zeros(len(images), int(caption.max()) + 1, dtype=torch.bool)
    says[owner, caption] = True

    has_text = says.any(1)
    values: dict[str, float] = {}
    values |= _recall(
        "image_to_text_recall",
        images[has_text],
        texts,
        lambda rows, answers: says[has_text][rows[:, None], caption[answers]],
    )
    values |= _recall(
        "text_to_image_recall", texts, images, lambda rows, answers: says[answers, caption[rows][:, None]]
    )
    return values


def _recall(
    name: str, queries: Tensor, answers: Tensor, right: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, float]:
    """Share of queries with a right answer among the k nearest, a block of queries at a time."""
    most = min(max(KS), len(answers))
    hits: list[Tensor] = []
    for rows in torch.arange(len(queries)).split(_CHUNK):
        nearest = (queries[rows] @ answers.T).topk(most, dim=1).indices
        hits.append(right(rows, nearest))
    hit = torch.cat(hits)
    return {f"{name}@{k}": hit[:, :k].any(1).double().mean().item() for k in KS}
