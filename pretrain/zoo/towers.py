"""What every image tower and every text tower looks like from outside.

B images or N texts, T tokens, P image tokens, D embedding width, W token width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


class Encoded(NamedTuple):
    """What one run of a tower gives."""

    pooled: Tensor
    """(B, D) one embedding each, not yet of unit norm."""
    tokens: Tensor
    """(B, P, W) the states of the last layer."""


class ImageTower(nn.Module, ABC):
    """(B, 3, H, W) uint8 images in, `Encoded` out. Normalises the pixels itself."""

    width: int
    """W of the tokens."""
    embed: int
    """D of the pooled embedding."""

    @abstractmethod
    def forward(self, images: Tensor) -> Encoded:
        """Encode (B, 3, H, W) uint8 images."""


class TextTower(nn.Module, ABC):
    """(N, T) token ids and (N,) lengths in, `Encoded` out."""

    width: int
    """W of the tokens."""
    embed: int
    """D of the pooled embedding."""
    context_length: int
    """The longest text it can read, in tokens."""

    @abstractmethod
    def forward(self, tokens: Tensor, length: Tensor) -> Encoded:
        """Encode (N, T) token ids, of which the first `length` (N,) of each row are text."""
