"""The norm of the gradient, whole and by tower, and its bound."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.pretrainer import Pretrainer


class Norms(NamedTuple):
    """Gradient norms before clipping."""

    whole: Tensor
    """()"""
    by_tower: dict[str, Tensor]
    """() of each tower, and of what belongs to none (`objectives`: temperatures, heads)."""


def gradient_norms(pretrainer: Pretrainer) -> Norms:
    """The norms of the gradient as it stands."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in pretrainer.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(_tower_of(name), []).append(parameter.grad)
    norms = {tower: torch.nn.utils.get_total_norm(gradients) for tower, gradients in parts.items()}
    return Norms(torch.linalg.vector_norm(torch.stack(list(norms.values()))), norms)


def clip(pretrainer: Pretrainer, norm: Tensor, *, largest: float) -> None:
    """Shorten a gradient of this norm to `largest` (0: not at all)."""
    torch.nn.utils.clip_grads_with_norm_(pretrainer.parameters(), largest or torch.inf, norm, foreach=True)


def _tower_of(parameter: str) -> str:
    """`model.image.trunk.norm.weight` is the image tower's; a temperature is no tower's."""
    _, part, *inside = parameter.split(".")
    return part if parameter.startswith("model.") and inside else "objectives"
