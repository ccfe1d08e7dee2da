"""The sigmoid loss of SigLIP: every image-text pair of the global batch is a yes-or-no question.

n pairs here, B images of all ranks, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.batch import Batch
from datasets.source import Field
from objectives.base import IMAGE, TEXT, Encodings, Objective, Terms, Widths
from objectives.contrast import Temperature, pool, similarity


def sigmoid_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """-log sigmoid(z * logits), z = +1 for positives and -1 for all others.

    Algorithm 1 of arXiv 2303.15343 (its equation has the other sign of the bias, which does not start at
    the prior). Source: google-research/big_vision, trainers/proj/image_text/siglip.py.

    Args:
        logits: (n, B) scale * similarity + bias.
        positive: (n, B) bool.

    Returns:
        (n, B) losses.
    """
    sign = 2.0 * positive.to(logits.dtype) - 1.0
    return -F.logsigmoid(sign * logits)


class SigLIP(Objective):
    """Sigmoid loss of our texts against the images of all ranks, per pair (not per pair squared).

    All known pairs are positives: the text's own image, and the image of an equal text.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """Settings of siglip."""

    needs: ClassVar[frozenset[Field]] = frozenset({"image", "text"})
    temperature: ClassVar[tuple[float, float | None] | None] = (10.0, -10.0)
    passes = (IMAGE, TEXT)
    coupled = (IMAGE, TEXT)

    def __init__(self, config: SigLIP.Config, widths: Widths) -> None:
        super().__init__()
        self.own_temperature = Temperature(lent=widths.temperature, initial=self.temperature)

    def denominator(self, batch: Batch) -> Tensor:
        """Pairs."""
        return batch.pair_valid.sum()

    def forward(self, encodings: Encodings, batch: Batch) -> Terms:
        """Sum over our texts and everybody's images."""
        here = pool(encodings, batch)
        scale, bias = self.own_temperature(encodings)
        assert bias is not None, "a model that lends its temperature to siglip has a bias"

        logits = scale * similarity(here.texts, here.all_images) + bias
        loss = sigmoid_loss(logits, here.kin_images).masked_fill(~here.image_valid, 0.0)
        with torch.no_grad():
            found = logits.masked_fill(~here.image_valid, -torch.inf).argmax(1, keepdim=True)
            hits = here.kin_images.gather(1, found).sum()
        return Terms(loss.sum(), {"accuracy": hits})

    def clamp(self) -> None:
        """Keep the scale at 100 or below."""
        self.own_temperature.clamp()
