"""A text encoder that looks at an image: the text tower's own blocks with cross-attention in between.

B images, M pairs of an image and a text, T tokens, S of them that are run, P image tokens, Dv their width,
W the text tower's width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from datasets.errors import UserError
from pretrain.zoo.attention import attend, split_heads
from pretrain.zoo.text import Glance, OpenClipText
from pretrain.zoo.towers import FusionTower, TextTower


class Fusion(FusionTower):
    """The image-grounded text encoder of BLIP's mixture (arXiv 2201.12086, section 3.1; models/med.py).

    A block runs self-attention, cross-attention over the image tokens, and its MLP. All but the
    cross-attention, and the norms that it reads through, is the text tower's: embeddings, positions, blocks,
    mask, and where it pools. A causal tower stays causal; what is pooled, the end of the text or a class
    token, has read all of it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Sizes of the cross-attention."""

        heads: int = 0
        """H, which divides the text tower's width; 0 for as many as its self-attention has."""
        every: int = 1
        """Every so many blocks one looks at the image, beginning with the first: 1 in BLIP, 2 in BLIP-2."""

    def __init__(self, config: Fusion.Config, *, text: OpenClipText, image_width: int) -> None:
        """Put it into a text tower, whose blocks take a glance from then on.

        Raises:
            UserError: the heads do not divide the text tower's width.
        """
        from pretrain.zoo.grounded import ground

        super().__init__()
        heads = config.heads or text.heads
        if text.width % heads:
            raise UserError(
                f"--model.fusion.heads is {heads}; it must divide the text tower's width, which is "
                f"{text.width}"
            )
        self.every = config.every
        blocks = text.tower.transformer.resblocks
        for block in blocks[:: self.every]:
            ground(block)
        self.image_norm = nn.LayerNorm(image_width)
        looking = len(blocks[:: self.every])
        self.read = nn.ModuleList(nn.Linear(image_width, 2 * text.width) for _ in range(looking))
        self.look = nn.ModuleList(_Look(text.width, heads=heads) for _ in range(looking))
        # In a tuple, because the tower is the model's part: its parameters are counted and saved there.
        self._text = (text,)
        self._initialise(layers=len(blocks))

    def _initialise(self, *, layers: int) -> None:
        """As open_clip initialises the attention of its text towers."""
        for read, look in zip(self.read, cast("list[_Look]", self.look), strict=True):
            assert isinstance(read, nn.Linear)
            nn.init.normal_(read.weight, std=read.in_features**-0.5)
            nn.init.normal_(look.query.weight, std=look.query.in_features**-0.5)
            nn.init.normal_(look.out.weight, std=(2 * layers * look.out.in_features) ** -0.5)
            for linear in (read, look.query, look.out):
                nn.init.zeros_(linear.bias)

    def forward(self, image_tokens: Tensor, image: Tensor, tokens: Tensor, length: Tensor) -> Tensor:
        """(M, W) the text tower's pooled states, before its projection; see `FusionTower`.

        The keys and values of an image are computed once, however many texts are read with it.
        """
        (text,) = self._text
        image_tokens = self.image_norm(image_tokens)
        glances: list[Glance | None] = [None] * len(text.tower.transformer.resblocks)
        glances[:: self.every] = [
            Glance(look, read(image_tokens), image) for read, look in zip(self.read, self.look, strict=True)
        ]
        return text(tokens, length, glances=glances).pooled


class _Look(nn.Module):
    """Cross-attention of a text's states over the tokens of its image; reads a norm."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, seen: Tensor, image: Tensor) -> Tensor:
        """(M, S, W) to add to the states x (M, S, W).

        Args:
            x: the states.
            seen: (B, P, 2W) keys and values of each image.
            image: (M,) the image of each text.
        """
        (query,) = split_heads(self.query(self.norm(x)), parts=1, heads=self.heads)
        key, value = split_heads(seen.index_select(0, image), parts=2, heads=self.heads)
        return self.out(attend(query, key, value, causal=False).transpose(1, 2).flatten(2))


def build_fusion(config: Fusion.Config, *, text: TextTower, image_width: int) -> Fusion | None:
    """A fusion tower inside the text tower; None where that is of transformers, whose blocks are its own.

    Raises:
        UserError: sizes that do not fit the text tower.
    """
    if not isinstance(text, OpenClipText):
        return None
    return Fusion(config, text=text, image_width=image_width)
