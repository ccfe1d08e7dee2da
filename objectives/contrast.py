"""What contrastive objectives share: who is whose positive, an exact product, and a temperature.

n pairs here, N texts and b images here, G texts and B images of all ranks, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from datasets.batch import Batch
from objectives.base import IMAGE, TEXT, Encodings
from objectives.gather import Rows, Wire, count_rows, grid_of
from objectives.strips import Block, exact

MAX_LOGIT_SCALE = math.log(100)
"""The bound of CLIP (arXiv 2103.00020, section 2.5), kept outside the graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The whole global batch by its identities: what belongs together, on every rank the same.

    A text equal to a pair's, or another text of its image, is no negative of that pair. Masked slots are in
    no pair and are no candidates.
    """

    images: Rows
    texts: Rows
    own: Tensor
    """(n,) places of our valid pairs' texts among our texts."""
    image_valid: Tensor
    """(B,) bool"""
    text_image: Tensor
    """(G,) place of each text's image among all images; -1 where the text is in no valid pair."""
    text_word: Tensor
    """(G,) number of the caption, equal for equal captions; -1 where the text is in no valid pair."""


@dataclass(slots=True)
class _Met:
    """What was gathered for one micro-batch, by whichever objective came first."""

    known: Known
    blocks: dict[Wire, Block]


_MET: WeakKeyDictionary[Encodings, _Met] = WeakKeyDictionary()


def meet(encodings: Encodings, batch: Batch) -> Known:
    """Learn who is whose positive among all ranks; gathered once for these encodings, and kept with them."""
    return _met(encodings, batch).known


def _met(encodings: Encodings, batch: Batch) -> _Met:
    if encodings not in _MET:
        _MET[encodings] = _Met(_learn(encodings, batch), {})
    return _MET[encodings]


def _learn(encodings: Encodings, batch: Batch) -> Known:
    device, group = batch.tokens.device, encodings.group
    images, texts = (count_rows(len(rows), group, device) for rows in (batch.images, batch.tokens))
    valid = batch.pair_valid
    image = torch.where(valid, batch.image_index + images.offset, -1)
    text_image, text_id = texts.collect(torch.stack([image, batch.text_id], dim=1)).unbind(1)
    paired = text_image >= 0
    word = torch.full_like(text_image, -1)
    word[paired] = _numbered(text_id[paired])[1]
    return Known(
        images=images,
        texts=texts,
        own=valid.nonzero().squeeze(1),
        image_valid=images.collect(batch.image_valid.to(torch.uint8)).bool(),
        text_image=text_image,
        text_word=word,
    )


def _numbered(values: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values, sorted, and for each value its place among them."""
    return torch.unique(values, return_inverse=True)  # pyright: ignore


@dataclass(frozen=True, slots=True)
class _Columns:
    """All columns of the whole matrix, and which of them each pair reads (see `Block`)."""

    word: Tensor
    """(B,) the caption whose other texts are no negatives of an image, or -1."""
    more_image: Tensor
    """(X,) images of the columns that are none of the B."""
    more_word: Tensor
    """(X,)"""
    of_pair: Tensor
    """(G,) below B an image, else B + which of the X; -1 where the text is in no valid pair."""
    special: Tensor
    """(G,) bool: texts with more kin than the column of their own image."""


def _columns(known: Known) -> _Columns:
    pairs = (known.text_image >= 0).nonzero().squeeze(1)
    image, word = known.text_image[pairs], known.text_word[pairs]
    images = len(known.image_valid)
    # Captions that stand beside several images.
    first, last = (
        word.new_zeros(len(pairs)).scatter_reduce_(0, word, image, how, include_self=False)
        for how in ("amin", "amax")
    )
    shared = torch.where((first != last)[word], word, -1)
    # Pairs of one image are read down one column where their captions exclude the same texts.
    kinds, kind = _numbered(image * (len(pairs) + 1) + shared + 1)
    kind_image, kind_word = kinds // (len(pairs) + 1), kinds % (len(pairs) + 1) - 1
    mixed = torch.bincount(kind_image, minlength=images) > 1
    more = mixed[kind_image]
    own_word = torch.full((images,), -1, device=word.device)
    own_word[kind_image[~more]] = kind_word[~more]
    column = torch.where(more, images - 1 + more.cumsum(0), kind_image)
    of_pair, special = (
        torch.full_like(known.text_image, -1),
        torch.zeros_like(known.text_image, dtype=torch.bool),
    )
    of_pair[pairs] = column[kind]
    special[pairs] = (shared >= 0) | mixed[image]
    return _Columns(own_word, kind_image[more], kind_word[more], of_pair, special)


def block(encodings: Encodings, batch: Batch, wire: Wire) -> Block:
    """Gather what this rank's part of the matrix needs, once for these encodings, without gradient."""
    met = _met(encodings, batch)
    if wire not in met.blocks:
        met.blocks[wire] = _gather_block(met.known, encodings, wire)
    return met.blocks[wire]


def _gather_block(known: Known, encodings: Encodings, wire: Wire) -> Block:
    grid, columns = grid_of(encodings.group), _columns(known)
    text_rows, image_rows = grid.rows_down(known.texts), grid.rows_across(known.images)
    device = known.own.device

    def places(rows: Rows, members: tuple[int, ...]) -> Tensor:
        """Of the rows of these ranks, the places among all ranks' rows."""
        starts = [sum(rows.counts[:member]) for member in members]
        parts = [torch.arange(at, at + rows.counts[m]) for at, m in zip(starts, members, strict=True)]
        return torch.cat(parts).to(device)

    text_place = places(known.texts, grid.down)
    row = (known.text_image[text_place] >= 0).nonzero().squeeze(1)
    text_place = text_place[row]
    image_place = places(known.images, grid.across)
    readable = known.image_valid[image_place].nonzero().squeeze(1)
    # Where each image and each further column stands in this block; -1 in another rank's.
    total = len(known.image_valid)
    at = torch.full((total + len(columns.more_image),), -1, device=device)
    at[image_place[readable]] = torch.arange(len(readable), device=device)
    more = (at[columns.more_image] >= 0).nonzero().squeeze(1)
    base = at[columns.more_image[more]]
    at[total + more] = len(readable) + torch.arange(len(more), device=device)
    column = torch.cat([readable, readable[base]])
    pairs = places(known.texts, grid.across)
    reads = columns.of_pair[pairs]
    sizes = [known.texts.counts[member] for member in grid.across]
    counts = tuple(int(part.sum()) for part in torch.split(reads >= 0, sizes))
    start = text_rows.offset
    inside = (row >= start) & (row < start + text_rows.counts[text_rows.rank])
    return Block(
        texts=text_rows.collect(encodings[TEXT].detach(), wire),
        images=image_rows.collect(encodings[IMAGE].detach(), wire),
        text_rows=text_rows,
        image_rows=image_rows,
        wire=wire,
        row=row,
        column=None if len(column) == len(readable) == len(image_place) else column,
        bases=len(readable),
        row_image=known.text_image[text_place],
        row_word=known.text_word[text_place],
        column_image=torch.cat([image_place[readable], columns.more_image[more]]),
        column_word=torch.cat([columns.word[image_place[readable]], columns.more_word[more]]),
        base=base,
        own=at[known.text_image[text_place]],
        special=columns.special[text_place].nonzero().squeeze(1).cpu(),
        mine=inside.nonzero().squeeze(1),
        pair_column=at[reads[reads >= 0]],
        pair_rows=Rows(counts, image_rows.rank, image_rows.group),
    )


def wire_error(here: Block, encodings: Encodings, batch: Batch, scale: Tensor) -> dict[str, Tensor]:
    """What rounding on the wire does: the sum over our pairs of the error of the pair's own logit.

    A softmax, and with it a gradient, is wrong by about this share. Nothing where nothing is rounded.
    """
    sent = [rows.group is not None and here.wire == "bf16" for rows in (here.image_rows, here.text_rows)]
    if not any(sent):
        return {}
    with torch.no_grad():
        own = batch.pair_valid.nonzero().squeeze(1)
        sides = encodings[IMAGE][batch.image_index[own]].float(), encodings[TEXT][own].float()
        came = [side.bfloat16().float() if far else side for side, far in zip(sides, sent, strict=True)]
        error = (came[0] * came[1] - sides[0] * sides[1]).sum(1).abs().sum()
        return {"wire_error": scale.squeeze() * error}


def similarity(rows: Tensor, columns: Tensor) -> Tensor:
    """(n, D), (G, D) -> (n, G) inner products in ieee float32 (float64 stays), backward included.

    Autocast and the global matmul precision are set aside, in both directions.
    """
    return _ExactProduct.apply(rows, columns)  # pyright: ignore[reportReturnType]


class _ExactProduct(torch.autograd.Function):
    """rows @ columns.T with all three matmuls, forward and backward, in full precision."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns)
        wide = torch.promote_types(rows.dtype, torch.float32)
        with exact(rows.device):
            return rows.to(wide) @ columns.to(wide).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        rows, columns = ctx.saved_tensors
        with exact(rows.device):
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
