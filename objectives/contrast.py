"""What contrastive objectives share: who is whose positive, an exact product, and a temperature.

n pairs here, b images here, G pairs of all ranks, B images of all ranks, D width.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from datasets.batch import Batch
from objectives.base import IMAGE, TEXT, Encodings
from objectives.gather import count_rows

MAX_LOGIT_SCALE = math.log(100)
"""The bound of CLIP (arXiv 2103.00020, section 2.5), kept outside the graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The whole global batch as one rank sees it: its own pairs as rows, everybody's as columns.

    A text equal to this pair's, or another text of this pair's image, is no negative: `kin` says which.
    Masked slots are in no pair and are no candidates.
    """

    own: Tensor
    """(n,) places of our valid pairs' texts among our texts."""
    images: Tensor
    """(n, D) the image of each of our pairs."""
    texts: Tensor
    """(n, D) the text of each of our pairs."""
    all_images: Tensor
    """(B, D)"""
    all_texts: Tensor
    """(G, D)"""
    image_target: Tensor
    """(n,) place of our pair's image among all images."""
    text_target: Tensor
    """(n,) place of our pair's text among all texts."""
    kin_images: Tensor
    """(n, B) bool: images that our pair's text, or an equal one, describes."""
    kin_texts: Tensor
    """(n, G) bool: texts that describe our pair's image, or equal one that does."""
    image_valid: Tensor
    """(B,) bool"""
    text_valid: Tensor
    """(G,) bool"""


def pool(encodings: Encodings, batch: Batch) -> Pool:
    """Gather the embeddings of every rank, with gradient, and work out who is whose positive."""
    device = batch.tokens.device
    image_rows = count_rows(len(batch.images), encodings.group, device)
    text_rows = count_rows(len(batch.tokens), encodings.group, device)

    known = [batch.image_index.clamp(min=0) + image_rows.offset, batch.text_id, batch.pair_valid.long()]
    all_image_index, all_text_id, all_text_valid = text_rows.gather(torch.stack(known, dim=1)).unbind(1)
    all_text_valid = all_text_valid.bool()
    all_image_valid = image_rows.gather(batch.image_valid.long()).bool()

    own = batch.pair_valid.nonzero().squeeze(1)
    image_target = batch.image_index[own] + image_rows.offset
    same_text = batch.text_id[own, None] == all_text_id
    same_image = image_target[:, None] == all_image_index
    kin_texts = (same_text | same_image) & all_text_valid
    kin_images = torch.zeros(len(own), len(all_image_valid), dtype=torch.int32, device=device)
    kin_images.scatter_add_(1, all_image_index.expand(len(own), -1), kin_texts.int())

    image, text = encodings[IMAGE], encodings[TEXT]
    return Pool(
        own=own,
        images=image[batch.image_index[own]],
        texts=text[own],
        all_images=image_rows.gather(image),
        all_texts=text_rows.gather(text),
        image_target=image_target,
        text_target=own + text_rows.offset,
        kin_images=kin_images > 0,
        kin_texts=kin_texts,
        image_valid=all_image_valid,
        text_valid=all_text_valid,
    )


def similarity(rows: Tensor, columns: Tensor) -> Tensor:
    """(n, D), (G, D) -> (n, G) inner products in ieee float32 (float64 stays), backward included.

    Logits of contrast must not be rounded to bfloat16 or TF32: at scale 100 that is an error of 0.4 in the
    exponent. Autocast and the global matmul precision are therefore set aside here, in both directions.
    """
    return _ExactProduct.apply(rows, columns)  # pyright: ignore[reportReturnType]


@contextmanager
def _ieee(device: torch.device) -> Generator[None]:
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore
    before: list[str] = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class _ExactProduct(torch.autograd.Function):
    """rows @ columns.T with all three matmuls, forward and backward, in full precision."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns)
        exact = torch.promote_types(rows.dtype, torch.float32)
        with _ieee(rows.device):
            return rows.to(exact) @ columns.to(exact).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        rows, columns = ctx.saved_tensors
        with _ieee(rows.device):
            of_rows = gradient @ columns.to(gradient.dtype)
            of_columns = gradient.T @ rows.to(gradient.dtype)
        return of_rows.to(rows.dtype), of_columns.to(columns.dtype)


class Temperature(nn.Module):
    """The logit scale and bias of one objective: lent by the model, or its own.

    The model has one pair, so that open_clip checkpoints load and save; a second contrastive objective
    beside the first must not pull at the same two numbers, and owns its own. Stored as (1,), because FSDP2
    refuses 0-d parameters.
    """

    def __init__(self, *, lent: bool, initial: tuple[float, float | None] | None) -> None:
        super().__init__()
        assert initial is not None, "a contrastive objective declares its initial scale and bias"
        scale, bias = initial
        self.logit_scale = None if lent else nn.Parameter(torch.tensor([math.log(scale)]))
        self.logit_bias = None if lent or bias is None else nn.Parameter(torch.tensor([bias]))

    def forward(self, encodings: Encodings) -> tuple[Tensor, Tensor | None]:
        """(1,) scale, already exponentiated, and (1,) bias or None."""
        if self.logit_scale is None:
            return encodings.logit_scale.exp(), encodings.logit_bias
        return self.logit_scale.exp(), self.logit_bias

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep our own scale at 100 or below; the model keeps its own."""
        if self.logit_scale is not None:
            self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
