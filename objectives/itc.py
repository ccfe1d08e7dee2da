"""Image-text contrast: InfoNCE over the whole global batch.

n pairs here, G texts of all ranks, B images of all ranks, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from datasets.batch import Batch
from datasets.source import Field
from objectives.base import IMAGE, TEXT, Encodings, Objective, Terms, Widths
from objectives.contrast import Temperature, pool, similarity


def info_nce(logits: Tensor, target: Tensor, excluded: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """-log softmax of the target over the candidates that are not excluded, for each row.

    CLIP, arXiv 2103.00020, figure 3; label smoothing spreads over the admitted candidates only.

    Args:
        logits: (n, G) scaled similarities.
        target: (n,) column of each row's positive.
        excluded: (n, G) bool, columns that are no candidates; never the target.
        smoothing: label smoothing in 0..1.

    Returns:
        (n,) losses.
    """
    log_share = logits.masked_fill(excluded, -torch.inf).log_softmax(1)
    loss = -log_share.gather(1, target[:, None]).squeeze(1)
    if smoothing == 0:
        return loss
    spread = -log_share.masked_fill(excluded, 0).sum(1) / (~excluded).sum(1)
    return (1 - smoothing) * loss + smoothing * spread


class ITC(Objective):
    """The mean of text-to-image and image-to-text InfoNCE, one term per pair.

    Every rank computes the rows of its own pairs against the columns of all ranks, gathered with gradient:
    the local form whose gradient is that of the whole-batch loss. A caption equal to the pair's own, and
    another caption of its image, is not a negative.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """Settings of itc."""

        smoothing: float = 0.0
        """Label smoothing (CLIP 0, BLIP-2 0.1)."""

    needs: ClassVar[frozenset[Field]] = frozenset({"image", "text"})
    temperature: ClassVar[tuple[float, float | None] | None] = (1 / 0.07, None)
    passes = (IMAGE, TEXT)
    coupled = (IMAGE, TEXT)

    def __init__(self, config: ITC.Config, widths: Widths) -> None:
        super().__init__()
        self.smoothing = config.smoothing
        self.own_temperature = Temperature(lent=widths.temperature, initial=self.temperature)

    def denominator(self, batch: Batch) -> Tensor:
        """Pairs."""
        return batch.pair_valid.sum()

    def forward(self, encodings: Encodings, batch: Batch) -> Terms:
        """Sum over our pairs of half of each direction's loss."""
        here = pool(encodings, batch)
        scale, _ = self.own_temperature(encodings)

        to_image = scale * similarity(here.texts, here.all_images)
        to_text = scale * similarity(here.images, here.all_texts)
        no_image = here.kin_images | ~here.image_valid
        no_text = here.kin_texts | ~here.text_valid
        no_image.scatter_(1, here.image_target[:, None], value=False)
        no_text.scatter_(1, here.text_target[:, None], value=False)

        loss = 0.5 * (
            info_nce(to_image, here.image_target, no_image, smoothing=self.smoothing)
            + info_nce(to_text, here.text_target, no_text, smoothing=self.smoothing)
        )
        with torch.no_grad():
            hits = 0.5 * (
                (to_image.masked_fill(no_image, -torch.inf).argmax(1) == here.image_target).sum()
                + (to_text.masked_fill(no_text, -torch.inf).argmax(1) == here.text_target).sum()
            )
        return Terms(loss.sum(), {"accuracy": hits})

    def clamp(self) -> None:
        """Keep the scale at 100 or below."""
        self.own_temperature.clamp()
