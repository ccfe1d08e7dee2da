"""Attention, written so that it is fast on CPUs too.

N texts, t tokens that ask, s tokens that are asked, H heads, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def split_heads(x: Tensor, *, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(N, t, parts * H * d) to `parts` tensors of (N, H, t, d)."""
    N, t, width = x.shape
    return x.view(N, t, parts, heads, width // parts // heads).permute(2, 0, 3, 1, 4).unbind(0)


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """(N, H, t, d) of (N, H, t, d) queries over (N, H, s, d) keys; where it is causal, t = s."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    # On CPUs the fused kernel's bfloat16 backward is several times slower than these products.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if causal:
        scores = scores + scores.new_full(scores.shape[-2:], -torch.inf).triu(1)
    return scores.softmax(-1) @ value
