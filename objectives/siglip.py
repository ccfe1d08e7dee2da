"""The sigmoid loss of SigLIP: every image-text pair of the global batch is a yes-or-no question.

N texts and b images here, B images of all ranks, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.batch import Batch
from datasets.source import Field
from objectives.base import IMAGE, TEXT, Encodings, Objective, Terms, Widths
from objectives.contrast import Temperature, block, wire_error
from objectives.gather import Wire
from objectives.strips import Block, Tile, exact, features, finish, pull, spend, what_to_pull


class SigLIP(Objective):
    """Sigmoid loss of all texts against all images, per pair (not per pair squared).

    All known pairs are positives: the text's own image, and the image of an equal text.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """Settings of siglip."""

        wire: Wire = "exact"
        """How embeddings and their gradients travel between ranks: bf16 is half the bytes, and rounds."""

    needs: ClassVar[frozenset[Field]] = frozenset({"image", "text"})
    temperature: ClassVar[tuple[float, float | None] | None] = (10.0, -10.0)
    passes = (IMAGE, TEXT)
    coupled = (IMAGE, TEXT)

    def __init__(self, config: SigLIP.Config, widths: Widths) -> None:
        super().__init__()
        self.wire: Wire = config.wire
        self.own_temperature = Temperature(lent=widths.temperature, initial=self.temperature)

    def denominator(self, batch: Batch) -> Tensor:
        """Pairs."""
        return batch.pair_valid.sum()

    def forward(self, encodings: Encodings, batch: Batch) -> Terms:
        """Sum over the texts and images of this rank's part of the matrix."""
        here = block(encodings, batch, self.wire)
        scale, bias = self.own_temperature(encodings)
        assert bias is not None, "a model that lends its temperature to siglip has a bias"
        total, hits = sigmoid_loss(encodings[IMAGE], encodings[TEXT], scale, bias, here)
        return Terms(total, {"accuracy": hits, **wire_error(here, encodings, batch, scale)})

    def clamp(self) -> None:
        """Keep the scale at 100 or below."""
        self.own_temperature.clamp()


def sigmoid_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, here: Block
) -> tuple[Tensor, Tensor]:
    """The sum of -log sigmoid(z * logits), z = +1 for positives and -1 for all others.

    Algorithm 1 of arXiv 2303.15343 (its equation has the other sign of the bias, which does not start at
    the prior). Source: google-research/big_vision, trainers/proj/image_text/siglip.py. Loss and gradient in
    one pass over the tiles, in the forward, with all collectives: 6 B^2 D floating-point operations. The
    upstream gradient must be the same on all ranks, as the weight of an objective over a global count is.

    Args:
        image: (b, D) embeddings of our images.
        text: (N, D) embeddings of our texts.
        scale: (1,) of the similarity.
        bias: (1,) added to it.
        here: what of the matrix we compute.

    Returns:
        () sum over our part of the matrix, and () count of our texts whose best image is a positive
        (detached).
    """
    return _Sigmoid.apply(image, text, scale, bias, here, torch.is_grad_enabled())  # pyright: ignore


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, here: Block, train: bool
    ) -> tuple[Tensor, Tensor]:
        with exact(image.device):
            asked = _Asked(here, bias.to(here.dtype))
            wanted = what_to_pull(ctx.needs_input_grad[:4]) if train else (False, False)
            columns = features(here, here.bases)
            found = pull(here, columns, scale.to(here.dtype), here.bases, asked.slope, wanted=wanted)
            if train:
                of_bias = asked.slopes.to(bias.dtype).expand_as(bias).clone()
                ctx.gradients = [*finish(here, found, scale, (image, text, scale)), of_bias]
        hits = asked.hits()
        ctx.mark_non_differentiable(hits)
        return asked.total, hits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*spend(ctx, gradients[0]), None, None)


class _Asked:
    """Sums over the tiles, while the slopes are made."""

    def __init__(self, here: Block, bias: Tensor) -> None:
        self.here, self.bias = here, bias
        self.total, self.slopes = bias.new_zeros(()), bias.new_zeros(())
        self.best = bias.new_full((2, len(here.row)), -torch.inf)
        """Of each row, the largest logit of a positive, and of a negative."""

    def slope(self, tile: Tile) -> Tensor:
        """(s, w) of the loss at each logit: sigmoid of negatives, minus that of the positives' negative."""
        logits, found, positive = tile.logits.add_(self.bias), tile.spare, tile.kin
        before = logits[tile.special]
        own = tile.take(-torch.inf)
        best = self.best[:, tile.rows]
        torch.maximum(best, torch.stack([own, logits.amax(1)]), out=best)
        if len(before):
            most = before.masked_fill(~positive, -torch.inf).amax(1)
            best[0, tile.special] = torch.maximum(best[0, tile.special], most)
            logits[tile.special] = torch.where(positive, -before, logits[tile.special])
        tile.put(logits, -own)
        self.total += F.softplus(logits, threshold=50).sum()
        torch.sigmoid(logits, out=found)
        if len(before):
            found[tile.special] = torch.where(positive, -found[tile.special], found[tile.special])
        tile.put(found, -torch.sigmoid(-own))
        self.slopes += found.sum()
        return found

    def hits(self) -> Tensor:
        """() how many of our texts have a positive above every negative."""
        positive, negative = self.here.text_rows.maximum(self.best)[:, self.here.mine]
        return (positive > negative).sum()
