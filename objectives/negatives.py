"""Which of the candidates is drawn: at random, and yet the same on any number of ranks and micro-batches.

What is random is not the place of a sample in a batch but its name: the noise of two samples is a hash of the
step's key and of both. Whoever computes it, in whatever order, draws the same.

s rows, C candidates, N texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from datasets.batch import Batch

_AT_ONCE = 1 << 18
"""Numbers of a strip for which noise is made at once: some megabytes beside the strip."""


def text_names(batch: Batch) -> Tensor:
    """(N,) int64: a name for each text of an image, made of its sample and its place in that."""
    image = batch.image_index
    order = image.argsort(stable=True)
    ordered = image[order]
    place = torch.empty_like(image)
    place[order] = torch.arange(len(image), device=image.device) - torch.searchsorted(ordered, ordered)
    return _mix(batch.sample_id[image.clamp(min=0)]) + place


def draw(logits: Tensor, rows: Tensor, columns: Tensor, *, key: Sequence[object]) -> Tensor:
    """Of each row one column, with the probabilities of its softmax.

    The largest of logits with Gumbel noise is such a draw (Gumbel 1954; Maddison et al., arXiv 1411.0030).
    Two layouts of one batch may round a logit differently, and only where two candidates come closer than
    that may they draw differently.

    Args:
        logits: (s, C), -inf where a column is no candidate.
        rows: (s,) int64 names.
        columns: (C,) int64 names.
        key: the noise is a function of it and of both names.

    Returns:
        (s,) int64 columns, -1 for a row that has no candidate.
    """
    if logits.shape[1] == 0:
        return torch.full_like(rows, -1)
    folded = _fold(key)
    drawn = [
        _largest(part + _gumbel(_mix(names + folded)[:, None] ^ _mix(columns)))
        for part, names in _parts(logits, rows)
    ]
    return torch.cat(drawn) if drawn else rows.new_empty(0)


def _parts(logits: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, _AT_ONCE // logits.shape[1])
    for first in range(0, len(rows), size):
        yield logits[first : first + size], rows[first : first + size]


def _largest(noisy: Tensor) -> Tensor:
    largest, at = noisy.max(1)
    return torch.where(largest > -torch.inf, at, -1)


def _fold(key: Sequence[object]) -> int:
    """A key as 64 bits with a sign."""
    return int.from_bytes(blake2b(repr(tuple(key)).encode(), digest_size=8).digest(), "little", signed=True)


def _gumbel(seeds: Tensor) -> Tensor:
    """Standard Gumbel noise in float64, a function of int64 seeds.

    52 bits and a half are a uniform number that is never 0 and never 1.
    """
    uniform = (_shifted(_mix(seeds), 12).double() + 0.5) * 2.0**-52
    return uniform.log_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): each bit depends on all; products wrap."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left, where torch copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
