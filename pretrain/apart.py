"""The samples of a batch apart from each other: which rows are whose, and one of them as a batch.

S samples, B images, N texts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from datasets.batch import Batch


def finite_by_sample(rows: Tensor, batch: Batch, *, of: Literal["image", "text"]) -> Tensor:
    """(S,) bool: whether all rows of each sample are finite.

    Args:
        rows: of every image (B, ...) or of every text (N, ...).
        batch: whose rows they are.
        of: which of the two.
    """
    finite = rows.detach().flatten(1).isfinite().all(1)
    if of == "text":
        whose = owners(batch)
        if whose is None:
            return finite.all().expand(len(batch.keys))
        known = whose >= 0
        bad = finite.new_zeros(len(batch.keys), dtype=torch.int32)
        return bad.index_add(0, whose[known], (~finite)[known].int()) == 0
    return finite if len(finite) else finite.new_ones(len(batch.keys))


def alone(batch: Batch, place: int) -> tuple[Batch, dict[str, Tensor]]:
    """One sample of a batch as a batch, and which of its rows of images and of texts are left.

    Where it is not known which texts are the sample's, it keeps all.
    """
    rows = torch.arange(len(batch.tokens), device=batch.tokens.device)
    whose = owners(batch)
    texts = rows if whose is None else rows[whose == place]
    images = torch.arange(len(batch.images), device=batch.images.device)[place : place + 1]
    of_images = {name: getattr(batch, name)[images] for name in ("images", "image_valid")}
    names = ("tokens", "text_length", "text_valid", "text_id", "boxes", "box_valid")
    of_texts = {name: getattr(batch, name)[texts] for name in names}
    index = batch.image_index[texts]
    one = replace(
        batch,
        **of_images,
        **of_texts,
        image_index=index.clamp(max=0),
        keys=batch.keys[place : place + 1],
        sample_id=batch.sample_id[place : place + 1],
    )
    return one, {"image": images, "text": texts}


def owners(batch: Batch) -> Tensor | None:
    """(N,) the sample that each text is of, -1 for one without image among images; None where none is known.

    None is known where samples without images have several texts.
    """
    if len(batch.images):
        return batch.image_index
    same = len(batch.tokens) == len(batch.keys)
    return torch.arange(len(batch.keys), device=batch.tokens.device) if same else None
