"""Image-text contrast: InfoNCE over the whole global batch.

n pairs here, N texts and b images here, G texts and B images of all ranks, D width; R rows, C columns and
Q pairs of the part of the matrix that this rank computes.
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
from objectives.strips import (
    LOG2E,
    Block,
    LogSum,
    Tile,
    exact,
    features,
    finish,
    own_logits,
    pull,
    spend,
    tiles,
    what_to_pull,
)


class ITC(Objective):
    """The mean of text-to-image and image-to-text InfoNCE, one term per pair.

    CLIP, arXiv 2103.00020, figure 3. A caption equal to the pair's own, and another caption of its image,
    is not a negative; label smoothing spreads over the admitted candidates only. The gradient is that of
    the whole-batch loss (see `InfoNCE`).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """Settings of itc."""

        smoothing: float = 0.0
        """Label smoothing (CLIP 0, BLIP-2 0.1)."""
        wire: Wire = "exact"
        """How embeddings and their gradients travel between ranks: bf16 is half the bytes, and rounds."""

    needs: ClassVar[frozenset[Field]] = frozenset({"image", "text"})
    temperature: ClassVar[tuple[float, float | None] | None] = (1 / 0.07, None)
    passes = (IMAGE, TEXT)
    coupled = (IMAGE, TEXT)

    def __init__(self, config: ITC.Config, widths: Widths) -> None:
        super().__init__()
        self.smoothing = config.smoothing
        self.wire: Wire = config.wire
        self.own_temperature = Temperature(lent=widths.temperature, initial=self.temperature)

    def denominator(self, batch: Batch) -> Tensor:
        """Pairs."""
        return batch.pair_valid.sum()

    def forward(self, encodings: Encodings, batch: Batch) -> Terms:
        """Sum over our pairs of half of each direction's loss."""
        here = block(encodings, batch, self.wire)
        scale, _ = self.own_temperature(encodings)
        total, hits = info_nce(encodings[IMAGE], encodings[TEXT], scale, here, smoothing=self.smoothing)
        return Terms(total, {"accuracy": hits, **wire_error(here, encodings, batch, scale)})

    def clamp(self) -> None:
        """Keep the scale at 100 or below."""
        self.own_temperature.clamp()


def info_nce(
    image: Tensor, text: Tensor, scale: Tensor, here: Block, *, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Half the sum of -log softmax of each pair, along rows and down columns; with an analytic gradient.

    With d the pair's own logit and M the log-sum-exp of its negatives, -log softmax is softplus(M - d).
    One pass over the tiles finds the M of rows and columns, of which all ranks of a row or a column then
    take the sum; a second has the gradient, softmax minus target. Both happen in the forward, with all
    collectives: 8 B^2 D floating-point operations, and memory linear in B. The upstream gradient must be
    the same on all ranks, as the weight of an objective over a global count is.

    Args:
        image: (b, D) embeddings of our images.
        text: (N, D) embeddings of our texts.
        scale: (1,) of the similarity.
        here: what of the matrix we compute.
        smoothing: label smoothing in 0..1.

    Returns:
        () sum over our pairs, and () half the count of arg-max hits, of both directions (detached).
    """
    return _InfoNCE.apply(image, text, scale, here, smoothing, torch.is_grad_enabled())  # pyright: ignore


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, here: Block, smoothing: float, train: bool
    ) -> tuple[Tensor, Tensor]:
        with exact(image.device):
            sums = _Sums(here, scale.to(here.dtype) * LOG2E, smoothing)
            total, hits = sums.loss()
            if train:
                found = sums.gradient(what_to_pull(ctx.needs_input_grad))
                ctx.gradients = finish(here, found, 0.5 * scale, (image, text, scale))
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*spend(ctx, gradients[0]), None, None, None)


class _Sums:
    """The log-sum-exps, in powers of two, of each row's and each column's negatives over all ranks."""

    def __init__(self, here: Block, factor: Tensor, smoothing: float) -> None:
        self.here, self.factor, self.smoothing = here, factor, smoothing
        self.columns = features(here, len(here.column_image))
        ends = len(here.row), len(self.columns)
        rows, downs = (LogSum(self.columns, lines) for lines in ends)
        # Of label smoothing: the sum of each line's admitted logits, and their count.
        spread = [self.columns.new_zeros(2, lines) for lines in ends]
        self.seen = self.columns.new_full((len(here.row),), -torch.inf)
        for _, tile in tiles(here, self.columns, factor, len(self.columns)):
            self.seen[tile.rows] = torch.maximum(self.seen[tile.rows], tile.take(-torch.inf))
            if tile.base:
                rows.add(tile.rows, tile.logits, 1, tile.spare)
            downs.add(tile.columns, tile.logits, 0, tile.spare)
            if smoothing:
                _spread(tile, *spread)
        self.ours = slice(here.pair_rows.offset, here.pair_rows.offset + len(here.mine))
        own = torch.full_like(self.seen, -torch.inf)
        own[here.mine] = own_logits(here, factor)
        pair_own = own.new_full((len(here.pair_column),), -torch.inf)
        pair_own[self.ours] = own[here.mine]
        self.row, self.row_own = rows.over(here.text_rows, own)
        self.down, self.pair_own = downs.over(here.image_rows, pair_own)
        self.row_top, self.down_top = rows.top, downs.top
        if smoothing:
            self.row_spread = here.text_rows.sum(spread[0])
            self.down_spread = here.image_rows.sum(spread[1])

    def loss(self) -> tuple[Tensor, Tensor]:
        """() half the sum over our pairs of both directions, and half their hits."""
        mine, reads = self.here.mine, self.here.pair_column[self.ours]
        own = self.row_own[mine]
        negatives = torch.stack([self.row[mine], self.down[reads]])
        total = F.softplus((negatives - own) / LOG2E, threshold=50).sum()
        if self.smoothing:
            for admitted, count in (self.row_spread[:, mine], self.down_spread[:, reads]):
                total += self.smoothing / LOG2E * (own - (admitted + own) / (count + 1)).sum()
        # Compared as the tiles have it, so that what is equal stays equal: a tie is no hit.
        seen = self.seen[mine]
        hits = (seen > self.row_top[mine]).sum() + (seen > self.down_top[reads]).sum()
        return 0.5 * total, 0.5 * hits

    def gradient(self, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """Of both directions' sum over all pairs, this block's part: at the unscaled similarity."""
        here, mine, reads = self.here, self.here.mine, self.here.pair_column
        full_row = torch.logaddexp2(self.row, self.row_own)
        pair = torch.logaddexp2(self.down[reads], self.pair_own)
        # A column is read by all pairs that share it: 2^(logit - pair) is summed over those.
        full_down = torch.full_like(self.down, torch.inf).scatter_reduce_(0, reads, pair, "amin")
        shares = torch.zeros_like(self.down).index_add_(0, reads, torch.exp2(full_down[reads] - pair))
        full_down = full_down - shares.log2()
        own = torch.zeros_like(full_row)
        value = self.row_own[mine]
        own[mine] = -torch.sigmoid((self.row[mine] - value) / LOG2E)
        own[mine] -= torch.sigmoid((self.down[reads[self.ours]] - value) / LOG2E)
        flat = None
        if self.smoothing:
            by_row, by_pair = (
                self.smoothing / (n + 1) for n in (self.row_spread[1], self.down_spread[1][reads])
            )
            own[mine] += 2 * self.smoothing - by_row[mine] - by_pair[self.ours]
            flat = by_row, torch.zeros_like(self.down).index_add_(0, reads, by_pair)

        def slope(tile: Tile) -> Tensor:
            tile.take(-torch.inf)
            logits, found = tile.logits, tile.spare
            torch.sub(logits, full_down[tile.columns], out=found).exp2_()
            if flat is not None:
                lower = flat[1][tile.columns] + (flat[0][tile.rows, None] if tile.base else 0)
                found -= torch.where(logits > -torch.inf, lower, 0)
            if tile.base:
                found += logits.sub_(full_row[tile.rows, None]).exp2_()
            tile.put(found, own[tile.rows])
            return found

        return pull(here, self.columns, self.factor, len(self.columns), slope, wanted=wanted)


def _spread(tile: Tile, row: Tensor, down: Tensor) -> None:
    """Add a tile's admitted logits and their counts to its rows (2, R) and its columns (2, C)."""
    admitted = tile.logits > -torch.inf
    tile.logits.masked_fill_(~admitted, 0)
    if tile.base:
        row[:, tile.rows] += torch.stack([tile.logits.sum(1), admitted.sum(1)])
    down[:, tile.columns] += torch.stack([tile.logits.sum(0), admitted.sum(0)])
