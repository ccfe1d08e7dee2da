"""Attention, written so that it is fast on CPUs too.

N texts, t tokens that ask, s tokens that are asked, H heads, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from objectives.as_on import chosen_for


def spells_out(device: torch.device) -> bool:
    """Whether products are spelled out on a device."""
    return chosen_for(device) == "cpu"


def split_heads(x: Tensor, *, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(N, t, parts * H * d) to `parts` tensors of (N, H, t, d)."""
    N, t, width = x.shape
    return x.view(N, t, parts, heads, width // parts // heads).permute(2, 0, 3, 1, 4).unbind(0)


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """(N, H, t, d) of (N, H, t, d) queries over (N, H, s, d) keys; where it is causal, t = s."""
    if not spells_out(query.device):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    t = query.shape[2]
    return _spelled_out(query, key, value, query.new_full((t, t), -torch.inf).triu(1) if causal else None)


class SpelledAttention(nn.MultiheadAttention):
    """torch's own module, with the same parameters and results, and its products spelled out.

    What it is not made for (weights asked for, padding masks, dropout, another layout) it leaves to torch.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(N, t, W) of (N, t, W) queries and (N, s, W) keys and values; see `torch.nn.MultiheadAttention`.

        Args:
            query: what asks.
            key: what is asked.
            value: what is answered.
            key_padding_mask: left to torch.
            need_weights: left to torch.
            attn_mask: added to the scores: (t, s) or (N * H, t, s); of truth values, left to torch.
            average_attn_weights: left to torch.
            is_causal: a hint that `attn_mask` is causal, which is not needed.
        """
        if need_weights or key_padding_mask is not None or not self._spells_out(query, attn_mask):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        states = _spelled_out(*self._project(query, key, value), attn_mask)
        return self.out_proj(states.transpose(1, 2).flatten(2)), None

    def _spells_out(self, query: Tensor, attn_mask: Tensor | None) -> bool:
        plain = self._qkv_same_embed_dim and self.bias_k is None and not self.add_zero_attn
        added = attn_mask is None or attn_mask.is_floating_point()
        return plain and added and self.batch_first and query.ndim == 3 and not self.dropout

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, H, t, d) queries, (N, H, s, d) keys and values; where all are one tensor, by one product."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value:
            asked, told, said = split_heads(F.linear(query, weight, bias), parts=3, heads=self.num_heads)
            return asked, told, said
        weights = weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        parts = [
            split_heads(F.linear(x, w, b), parts=1, heads=self.num_heads)[0]
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        ]
        return parts[0], parts[1], parts[2]


def spell_out(module: nn.Module) -> None:
    """Make every attention inside that is torch's own a spelled one; it stays the same object."""
    for part in module.modules():
        if type(part) is nn.MultiheadAttention:
            part.__class__ = SpelledAttention


def _spelled_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """(N, H, t, d): on CPUs the fused kernel's bfloat16 backward is several times slower than these products.

    Args:
        query: (N, H, t, d).
        key: (N, H, s, d).
        value: (N, H, s, d).
        mask: added to the scores, of a shape that broadcasts to (N, H, t, s).
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return scores.softmax(-1) @ value
