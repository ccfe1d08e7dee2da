"""The similarity of all texts with all images in tiles: exact, masked, and never stored whole.

Losses take what they need from each tile, so that memory grows with the number of rows and not with its
square: log-sum-exps in one pass over the tiles, gradients in a second. Logits are in powers of two, because
torch has exp2 as one fast vectorised kernel on a CPU, also where the result underflows.

R rows (texts of pairs), C columns (images), D width, s w of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from objectives.as_on import chosen_for
from objectives.gather import Rows, Wire

LOG2E = 1 / math.log(2)


def tile_shape(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile: on a CPU it stays in its caches, on a GPU it fills the device."""
    return (512, 2048) if chosen_for(device) == "cpu" else (2048, 8192)


@contextmanager
def exact(device: torch.device) -> Generator[None]:
    """Products of float32 in here are those of ieee float32, whatever autocast and the global settings say.

    Logits of contrast must not be rounded to bfloat16 or TF32: at scale 100 that is an error of 0.4 in the
    exponent.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore
    before: list[str] = [backend.fp32_precision for backend in backends]
    # On CPUs with AVX512 but not AMX, allowing bfloat16 only lets oneDNN take products of float32: it
    # computes them in float32, as exact as MKL's and faster.
    fast = torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported()  # pyright: ignore
    try:
        for backend, precision in zip(backends, ("ieee", "bf16" if fast else "ieee"), strict=True):
            backend.fp32_precision = precision
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """This rank's part of the matrix of all texts and all images, and who is whose positive in it.

    The rows are the texts of valid pairs. The first `bases` columns are readable images. An image whose
    captions do not all recur at the same other images has columns of its own for reading down (from image
    to texts), because a caption's equals are no negatives of that caption's pair, but are of its siblings';
    `base` says which images those are.
    """

    texts: Tensor
    """(., D) of the ranks of our column, detached."""
    images: Tensor
    """(., D) of the ranks of our row, detached."""
    text_rows: Rows
    image_rows: Rows
    wire: Wire
    row: Tensor
    """(R,) places among texts."""
    column: Tensor | None
    """(C,) places among images; None where they are all images in order."""
    bases: int
    row_image: Tensor
    """(R,) the image of each pair, by its place among all ranks' images."""
    row_word: Tensor
    """(R,) the caption of each pair; equal captions have equal numbers."""
    column_image: Tensor
    """(C,)"""
    column_word: Tensor
    """(C,) the caption whose other texts are no negatives of this column, or -1."""
    base: Tensor
    """(C - bases,) the base column of each column that is none."""
    own: Tensor
    """(R,) each row's own image among the base columns, or -1: another rank's."""
    special: Tensor
    """(.,) sorted rows with more kin than their own image, on the CPU."""
    mine: Tensor
    """(n,) our own pairs among the rows."""
    pair_column: Tensor
    """(Q,) the column that each pair of our row of ranks reads down, rank by rank."""
    pair_rows: Rows
    """Pairs of each rank of our row."""

    @property
    def dtype(self) -> torch.dtype:
        """Of logits and gradients: float32, or wider where the features are."""
        return torch.promote_types(self.texts.dtype, torch.float32)

    def kin(self, rows: Tensor) -> Tensor:
        """(k,) rows -> (k, C) bool: the columns that are positives of these rows, or of their equals."""
        word = self.row_word[rows, None]
        same = (self.row_image[rows, None] == self.column_image) | (word == self.column_word)
        if len(self.base):
            # An image is kin by any of its captions, wherever those columns stand.
            by_any = (word == self.column_word[self.bases :]).to(torch.uint8)
            same[:, : self.bases] |= (
                by_any.new_zeros(len(rows), self.bases).index_add_(1, self.base, by_any) > 0
            )
        return same


@dataclass(frozen=True, slots=True)
class Tile:
    """Some rows against some columns."""

    rows: slice
    columns: slice
    base: bool
    """Whether its columns are base columns: only those are read along a row."""
    logits: Tensor
    """(s, w), overwritten by whoever reads it."""
    spare: Tensor
    """(s, w) room to work in."""
    at: Tensor
    """(s, 1) column of this tile that is each row's own image, where `here`."""
    here: Tensor
    """(s, 1) bool"""
    special: Tensor
    """(k,) rows of this tile with more kin than that."""
    kin: Tensor
    """(k, w) bool: the kin of those."""

    def take(self, value: float) -> Tensor:
        """(s,) logits of the rows' own images, -inf where they are elsewhere; all kin becomes `value`."""
        own = self.logits.gather(1, self.at)
        if len(self.special):
            self.logits[self.special] = self.logits[self.special].masked_fill_(self.kin, value)
        self.logits.scatter_(1, self.at, torch.where(self.here, value, self.logits.gather(1, self.at)))
        return torch.where(self.here, own, -torch.inf).squeeze(1)

    def put(self, matrix: Tensor, own: Tensor) -> None:
        """Set what `matrix`, of this tile's shape, has at the rows' own images; (s,) values."""
        matrix.scatter_(1, self.at, torch.where(self.here, own[:, None], matrix.gather(1, self.at)))


def tiles(block: Block, columns: Tensor, factor: Tensor, end: int) -> Iterator[tuple[Tensor, Tile]]:
    """The matrix `factor * texts @ images.T`, tile by tile, rows outside.

    Args:
        block: rows and columns.
        columns: (C, D) features of the columns.
        factor: () of the similarity.
        end: columns to go to: all, or only base columns.

    Yields:
        (s, D) features of the tile's rows, and the tile.
    """
    height, width = tile_shape(columns.device)
    starts = [*range(0, block.bases, width), *range(block.bases, end, width)]
    room = columns.new_empty(2, min(height, len(block.row)) * min(width, end))
    strips = torch.arange(0, len(block.row) + height, height)
    bounds = [int(bound) for bound in torch.searchsorted(block.special, strips)]
    for strip, top in enumerate(range(0, len(block.row), height)):
        rows = slice(top, min(top + height, len(block.row)))
        special = block.special[bounds[strip] : bounds[strip + 1]].to(columns.device)
        kin = block.kin(special)
        texts = block.texts[block.row[rows]].to(columns.dtype)
        scaled = texts * factor
        for start in starts:
            base = start < block.bases
            across = slice(start, min(start + width, block.bases if base else end))
            shape = (len(texts), across.stop - across.start)
            logits, spare = (part[: shape[0] * shape[1]].view(shape) for part in room)
            torch.mm(scaled, columns[across].T, out=logits)
            at = block.own[rows, None] - start
            here = (block.own[rows, None] >= 0) & (at >= 0) & (at < shape[1])
            at = at.clamp(0, shape[1] - 1)
            yield texts, Tile(rows, across, base, logits, spare, at, here, special - top, kin[:, across])


def features(block: Block, end: int) -> Tensor:
    """(end, D) of the first columns, in the precision of the logits."""
    images = block.images if block.column is None else block.images[block.column[:end]]
    return images[:end].to(block.dtype)


def own_logits(block: Block, factor: Tensor) -> Tensor:
    """(n,) logits of our own pairs, added up in float64: an error there is one of all the pair's gradient."""
    found: list[Tensor] = [factor.new_zeros(0)]
    for mine in torch.split(block.mine, tile_shape(factor.device)[0]):
        at = block.own[mine] if block.column is None else block.column[block.own[mine]]
        text, image = block.texts[block.row[mine]].double(), block.images[at].double()
        found.append((text * image).sum(1).mul_(factor).to(factor.dtype))
    return torch.cat(found)


class LogSum:
    """Of many lines, the running maximum and the sum of powers of two below it."""

    def __init__(self, like: Tensor, lines: int) -> None:
        self.top = like.new_full((lines,), -torch.inf)
        self.total = like.new_zeros(lines)

    def add(self, lines: slice, logits: Tensor, dim: int, spare: Tensor) -> None:
        """Add a tile, whose lines run along `dim`."""
        top = torch.maximum(self.top[lines], logits.amax(dim))
        shift = _finite(top)
        torch.sub(logits, shift.unsqueeze(dim), out=spare)
        self.total[lines] *= torch.exp2(self.top[lines] - shift)
        self.total[lines] += spare.exp2_().sum(dim)
        self.top[lines] = top

    def over(self, ranks: Rows, beside: Tensor) -> tuple[Tensor, Tensor]:
        """(lines,) the logarithm of the sum over ranks; and of `beside` the maximum over ranks."""
        most = ranks.maximum(torch.cat([self.top, beside]))
        top, beside = most[: len(self.top)], most[len(self.top) :]
        self.total *= torch.exp2(self.top - _finite(top))
        self.top = top
        return top + ranks.sum(self.total).log2(), beside


def _finite(top: Tensor) -> Tensor:
    """A line without a candidate has -inf, from which nothing can be subtracted."""
    return top.clamp_min(torch.finfo(top.dtype).min)


def pull(
    block: Block,
    columns: Tensor,
    factor: Tensor,
    end: int,
    slope: Callable[[Tile], Tensor],
    *,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients at the features of all ranks of the block, from the slope of the loss at each logit.

    Args:
        block: rows and columns.
        columns: (C, D) features of the columns.
        factor: () of the similarity in the tiles.
        end: columns to go to.
        slope: (s, w) of a tile; it may stand in the tile's room.
        wanted: whether of texts, of images.

    Returns:
        Gradients at (., D) texts and (., D) images of the unscaled similarity, or None.
    """
    of_texts = torch.zeros_like(block.texts, dtype=block.dtype) if wanted[0] else None
    of_columns = torch.zeros_like(columns) if wanted[1] else None
    strip = None
    for texts, tile in tiles(block, columns, factor, end):
        gradient = slope(tile)
        if of_columns is not None:
            of_columns[tile.columns].addmm_(gradient.T, texts)
        if of_texts is not None:
            if tile.columns.start == 0:
                strip = torch.zeros_like(texts)
            assert strip is not None
            strip.addmm_(gradient, columns[tile.columns])
            if tile.columns.stop == end:
                of_texts[block.row[tile.rows]] = strip
    if of_columns is not None and block.column is not None:
        of_images = torch.zeros_like(block.images, dtype=block.dtype)
        of_columns = of_images.index_add_(0, block.column[:end], of_columns)
    return of_texts, of_columns


def what_to_pull(needed: tuple[bool, ...]) -> tuple[bool, bool]:
    """Which gradients `pull` must give, texts' and images', for those of image, text and scale."""
    image, text, *temperature = needed
    return text or (any(temperature) and not image), image


def finish(
    block: Block, found: tuple[Tensor | None, Tensor | None], factor: Tensor, inputs: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """Gradients at our own image and text embeddings and at the scale, from those of the block.

    Args:
        block: rows and columns.
        found: what `pull` gave.
        factor: (1,) of the unscaled similarity in the loss.
        inputs: (b, D) image, (N, D) text, (1,) scale.
    """
    image, text, scale = inputs
    of_text, of_image = found
    of_scale = None
    for gradient, ours in ((of_text, block.texts), (of_image, block.images)):
        if gradient is not None and of_scale is None:
            of_scale = torch.einsum("nd,nd->n", gradient, ours.to(gradient.dtype)).sum() * factor / scale
    if of_image is not None:
        of_image = block.image_rows.give_back(of_image, block.wire).mul_(factor).to(image.dtype)
    if of_text is not None:
        of_text = block.text_rows.give_back(of_text, block.wire).mul_(factor).to(text.dtype)
    return [of_image, of_text, None if of_scale is None else of_scale.to(scale.dtype)]


def spend(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """Gradients that a forward left in its context, times the upstream one, in place.

    Raises:
        RuntimeError: they were taken before.
    """
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        raise RuntimeError("the gradient of a contrastive loss is kept for one backward")
    return [None if gradient is None else gradient.mul_(upstream) for gradient in gradients]
