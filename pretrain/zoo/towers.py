"""What image towers, text towers, decoders that write captions and fusion towers look like from outside.

B images or N texts, M pairs of them, T tokens, P image tokens, D embedding width, W token width,
Dt a decoder's width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from pretrain.zoo.head import VocabularyHead


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


class TextDecoder(nn.Module, ABC):
    """Image tokens and the beginning of a text in, states that predict its next token out.

    Causal: state t has read the image and tokens 0..t, and nothing behind them.
    """

    reads_states: ClassVar[bool]
    """Whether it reads the text tower's states of the tokens, or their ids."""
    context_length: int
    """The longest text it can read, in tokens."""
    head: VocabularyHead
    """States to the vocabulary."""

    @abstractmethod
    def forward(self, image_tokens: Tensor | None, text: Tensor) -> Tensor:
        """(N, t, Dt) of the image of each text (N, P, W) and its first t ids (N, t) or states (N, t, W).

        Without images it is a language model: what looks at them is left out.
        """

    @abstractmethod
    def start(self, image_tokens: Tensor) -> Any:
        """What generation keeps between tokens: it has read the (N, P, W) image and no text."""

    @abstractmethod
    def extend(self, tokens: Tensor, *, cache: Any) -> Tensor:
        """Read (N, t) more token ids into what `start` gave, and return their (N, t, Dt) states."""


class FusionTower(nn.Module, ABC):
    """Pairs of an image and a text in, one state of each pair that has read both out."""

    @abstractmethod
    def forward(self, image_tokens: Tensor, image: Tensor, tokens: Tensor, length: Tensor) -> Tensor:
        """Read pairs.

        Args:
            image_tokens: (B, P, Dv) of the images; one may be in many pairs or in none.
            image: (M,) int64, the place of each pair's image among them.
            tokens: (M, T) int64, the ids of each pair's text.
            length: (M,) int64, how many of them are text.

        Returns:
            (M, W)
        """
