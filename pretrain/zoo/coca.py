"""The captioning decoder of an open_clip CoCa, which reads the text tower's states and the image's tokens.

N texts, T tokens, P image tokens, W their width and that of the text states, Dt the same, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from datasets.errors import UserError
from pretrain.zoo.head import ColumnHead
from pretrain.zoo.text import OpenClipText
from pretrain.zoo.towers import ImageTower, TextDecoder, TextTower

if TYPE_CHECKING:
    from open_clip.transformer import MultimodalTransformer


@dataclass(slots=True)
class Prefix:
    """What generation keeps between tokens."""

    image_tokens: Tensor
    """(N, P, W)"""
    tokens: Tensor
    """(N, t) ids read so far."""


class CoCaDecoder(TextDecoder):
    """open_clip's MultimodalTransformer (CoCa, arXiv 2205.01917) without its projection to the vocabulary.

    The lower half of CoCa's text decoder is the text tower, which runs once for contrast and captions. The
    projection is the head's, so that the logits of a whole batch are never there.
    """

    reads_states: ClassVar[bool] = True

    def __init__(self, decoder: MultimodalTransformer, *, text: OpenClipText) -> None:
        super().__init__()
        self.head = ColumnHead(decoder.text_projection)
        decoder.text_projection = None  # pyright: ignore[reportAttributeAccessIssue]
        self.decoder = decoder
        self.context_length = text.context_length
        # To write, it has to read its own words. In a tuple, because the tower is the model's part: its
        # parameters are counted and saved there.
        self._text = (text,)

    def forward(self, image_tokens: Tensor | None, text: Tensor) -> Tensor:
        """(N, t, Dt) of the image of each text (N, P, W), if any, and the text tower's states (N, t, W)."""
        if image_tokens is not None:
            return self.decoder(image_tokens, text)
        before: Tensor = self.decoder.attn_mask  # pyright: ignore[reportAssignmentType]
        before = before[: text.shape[1], : text.shape[1]]
        for block in self.decoder.resblocks:
            text = block(text, attn_mask=before)
        return self.decoder.ln_final(text)

    def start(self, image_tokens: Tensor) -> Prefix:
        """Read the (N, P, W) image and no text."""
        nothing = torch.zeros(len(image_tokens), 0, dtype=torch.int64, device=image_tokens.device)
        return Prefix(image_tokens=image_tokens, tokens=nothing)

    def extend(self, tokens: Tensor, *, cache: Prefix) -> Tensor:
        """(N, t, Dt) of (N, t) more ids. The whole text is run again: open_clip's blocks keep nothing."""
        cache.tokens = torch.cat([cache.tokens, tokens], dim=1)
        length = torch.full((len(tokens),), cache.tokens.shape[1], device=tokens.device)
        states = self._text[0](cache.tokens, length).tokens
        return self(cache.image_tokens, states)[:, -tokens.shape[1] :]


def wrap_decoder(
    decoder: MultimodalTransformer, *, image: ImageTower, text: TextTower, name: str
) -> CoCaDecoder:
    """The decoder of a CoCa beside its towers.

    Raises:
        UserError: the text tower sees the words that are to be predicted, or the sizes do not fit.
    """
    if not isinstance(text, OpenClipText) or text.tower.attn_mask is None:
        raise UserError(
            f"{name} cannot learn to write: its text tower sees the words that its decoder is to predict; "
            "take a CoCa with a causal text tower, such as open_clip:coca_ViT-B-32"
        )
    widths = {"decoder": decoder.width, "image tower": image.width, "text tower": text.width}
    if len(set(widths.values())) > 1:
        raise UserError(
            f"{name} does not fit together: "
            + ", ".join(f"its {part} has tokens of width {width}" for part, width in widths.items())
        )
    if decoder.context_length < text.context_length:
        raise UserError(
            f"{name} does not fit together: its decoder reads {decoder.context_length} tokens and its text "
            f"tower {text.context_length}"
        )
    return CoCaDecoder(decoder, text=text)


def init_projection(projection: nn.Parameter) -> None:
    """Initialise a (Dt, V) projection to the vocabulary, which open_clip leaves as memory happened to be."""
    nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
