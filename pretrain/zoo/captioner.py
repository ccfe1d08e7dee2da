"""A captioning decoder: text tokens attend to those before them and to the tokens of an image.

N texts, T tokens, P image tokens, Dv their width, Dt the decoder's width, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.zoo.attention import attend, split_heads
from pretrain.zoo.head import VocabularyHead
from pretrain.zoo.towers import TextDecoder


@dataclass(slots=True)
class Cache:
    """What generation keeps between tokens."""

    image: Tensor | None
    """(N, P, Dv) the image as blocks look at it, if there is one."""
    cross: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    """Of each layer: (N, H, P, Dt/H) keys and values of the image, computed once; None without an image."""
    past: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of each layer: (N, H, t, Dt/H) keys and values of the t tokens read so far."""

    @property
    def length(self) -> int:
        """t, the tokens read so far."""
        return self.past[0][0].shape[2] if self.past else 0


class Captioner(TextDecoder):
    """A pre-norm transformer decoder with cross-attention (Vaswani et al., arXiv 1706.03762).

    Causal and padded on the right, so what stands after a token cannot be seen. The rows of the
    vocabulary head are the token embeddings (Press and Wolf, arXiv 1608.05859).
    """

    reads_states: ClassVar[bool] = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Sizes of the decoder."""

        width: int = 128
        """Dt."""
        layers: int = 1
        """Blocks of self-attention, cross-attention and a feed-forward layer."""
        heads: int = 4
        """H; divides the width."""
        hidden: float = 2.0
        """Width of the feed-forward layers, in units of the decoder's."""

    def __init__(
        self, config: Captioner.Config, *, image_width: int, vocabulary: int, context_length: int
    ) -> None:
        super().__init__()
        self.width = config.width
        self.context_length = context_length
        rows = nn.Parameter(torch.empty(vocabulary, config.width))
        nn.init.normal_(rows, std=0.02)
        self.head = VocabularyHead(rows)
        self.position = nn.Parameter(torch.empty(context_length, config.width))
        nn.init.normal_(self.position, std=0.01)
        self.image_norm = nn.LayerNorm(image_width)
        self.blocks = nn.ModuleList(_Block(config, image_width=image_width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, image_tokens: Tensor | None, text: Tensor) -> Tensor:
        """States that predict the next token.

        Args:
            image_tokens: (N, P, Dv), the image of each text; None for texts without images.
            text: (N, T-1) int64, all tokens but the last.

        Returns:
            (N, T-1, Dt): state t has read the image and tokens 0..t.
        """
        seen = self.start(image_tokens).image
        x = self._embed(text, begin=0)
        for block in self.blocks:
            x, _ = block(x, image=seen)
        return self.norm(x)

    def start(self, image_tokens: Tensor | None) -> Cache:
        """A cache that has read the image and no text."""
        return Cache(None if image_tokens is None else self.image_norm(image_tokens))

    def extend(self, tokens: Tensor, *, cache: Cache) -> Tensor:
        """Read (N, t) more tokens into the cache and return their (N, t, Dt) states."""
        begin = cache.length
        assert begin == 0 or tokens.shape[1] == 1, "after the first call tokens come one at a time"
        x = self._embed(tokens, begin=begin)
        kept: list[_Kept] = []
        for i, block in enumerate(self.blocks):
            if begin:
                x, keep = block(x, cross=cache.cross[i], past=cache.past[i], keep=True)
            else:
                x, keep = block(x, image=cache.image, keep=True)
            kept.append(keep)
        cache.cross, cache.past = [keep.cross for keep in kept], [keep.past for keep in kept]
        return self.norm(x)

    def _embed(self, tokens: Tensor, *, begin: int) -> Tensor:
        """(N, t, Dt) of (N, t) ids, the first of which stands at `begin`."""
        return F.embedding(tokens, self.head.weight) + self.position[begin : begin + tokens.shape[1]]


class _Kept(NamedTuple):
    """What a block keeps for the next token."""

    past: tuple[Tensor, Tensor]
    """(N, H, t, Dt/H) keys and values of all tokens so far."""
    cross: tuple[Tensor, Tensor] | None
    """(N, H, P, Dt/H) those of the image, if there is one."""


class _Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; each reads a norm and adds to its input."""

    def __init__(self, config: Captioner.Config, *, image_width: int) -> None:
        super().__init__()
        width, hidden = config.width, int(config.hidden * config.width)
        self.heads = config.heads
        self.self_norm, self.cross_norm, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.self_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query, self.cross_out = nn.Linear(width, width), nn.Linear(width, width)
        self.look_kv = nn.Linear(image_width, 2 * width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.ndim == 2:
                nn.init.xavier_uniform_(weight)

    def look(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H, P, Dt/H) of the image."""
        key, value = split_heads(self.look_kv(image), parts=2, heads=self.heads)
        return key, value

    def forward(
        self,
        x: Tensor,
        *,
        image: Tensor | None = None,
        cross: tuple[Tensor, Tensor] | None = None,
        past: tuple[Tensor, Tensor] | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, _Kept | None]:
        """(N, t, Dt) states after this block, and what is kept for the next token.

        The image is looked at in here: whoever shards or checkpoints blocks sees all that they do.

        Args:
            x: (N, t, Dt) states.
            image: (N, P, Dv), where nobody has looked at it yet.
            cross: what `look` said of it, where somebody has.
            past: keys and values of the tokens before these.
            keep: whether a next token will come.
        """
        query, key, value = split_heads(self.qkv(self.self_norm(x)), parts=3, heads=self.heads)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        heard = attend(query, key, value, causal=past is None)
        x = x + self.self_out(heard.transpose(1, 2).flatten(2))
        if image is not None:
            cross = self.look(image)
        if cross is not None:
            (query,) = split_heads(self.query(self.cross_norm(x)), parts=1, heads=self.heads)
            seen = attend(query, *cross, causal=False)
            x = x + self.cross_out(seen.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return x, _Kept((key, value), cross) if keep else None
