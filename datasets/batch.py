"""One micro-batch, ragged from the first day: N texts over B images.

S samples, B images, N texts, T tokens of the longest text in this batch, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tensors of one micro-batch of one source.

    A text belongs to the image at `image_index`; several texts may share an image, an image may have
    none, and a text without image has index -1. A masked slot (a sample that could not be read) keeps
    its rows with `image_valid` and `text_valid` False, and every objective leaves it out.
    """

    images: Tensor
    """(B, 3, H, W) uint8; normalised on the device, by the image tower."""
    image_valid: Tensor
    """(B,) bool"""
    tokens: Tensor
    """(N, T) int64: start, words, end, then padding up to the longest text of the batch."""
    text_length: Tensor
    """(N,) int64: tokens of each text, start and end counted."""
    image_index: Tensor
    """(N,) int64 into B, or -1."""
    text_valid: Tensor
    """(N,) bool"""
    text_id: Tensor
    """(N,) int64: a hash of the caption. Equal captions are positives of each other."""
    boxes: Tensor
    """(N, 4) float32: x0, y0, x1, y1 in 0..1 of the image as it is here; zeros for a text without a box."""
    box_valid: Tensor
    """(N,) bool: texts that name a box."""
    keys: tuple[str, ...]
    """(S,) the samples' names, for the ledger and for messages. B = S, or 0 for text alone."""
    sample_id: Tensor
    """(S,) int64: a hash of each sample's source and name (`sample_id`); that of an image where B = S."""
    source: str = ""
    """Which source of the run it is of."""

    @property
    def pair_valid(self) -> Tensor:
        """(N,) bool: texts that stand beside a readable image of their own."""
        # Index -1, no image, finds the False at the end; so does any text of a batch without images.
        readable = torch.cat([self.image_valid, self.image_valid.new_zeros(1)])
        return self.text_valid & readable[self.image_index]

    @property
    def token_mask(self) -> Tensor:
        """(N, T) bool: True on start, words and end; False on padding and on masked texts."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (places < self.text_length[:, None]) & self.text_valid[:, None]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value.to(device) if isinstance(value, Tensor) else value
        return Batch(**moved)


def sample_id(source: str, key: str) -> int:
    """63 bits of a hash, the same in every process. Shards of two sources may name their samples alike."""
    digest = blake2b(f"{source}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
