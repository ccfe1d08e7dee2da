"""The optimizer: which parameter decays, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from datasets.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with linear warm-up and cosine decay to zero over the stage."""

    lr: float = 3e-3
    """Peak learning rate."""
    warmup: int = 100
    """Steps from zero to the peak."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the moments (CLIP's for a ViT)."""
    eps: float = 1e-6
    """AdamW's epsilon (CLIP's for a ViT)."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors, embeddings of positions and temperatures have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 leaves it alone."""

    def check(self, flag: str) -> None:
        """Refuse what AdamW cannot run with.

        Raises:
            UserError: names the flag, of which `flag` is the beginning.
        """
        for key in ("lr", "eps"):
            if not 0 < getattr(self, key) < math.inf:
                raise UserError(f"{flag}.{key} is {getattr(self, key)}; it must be a number above 0")
        for key in ("warmup", "weight_decay", "clip"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"{flag}.{key} is {getattr(self, key)}; it must be a number of at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"{flag}.betas are {self.betas}; both must lie in 0..1, below 1")

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of 0 <= step < steps."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


def build_optimizer(module: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over what trains, in two groups: matrices, which decay, and the rest.

    Positions are told apart from matrices by what they are called in open_clip and timm.
    """
    decays: list[nn.Parameter] = []
    stays: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith(("positional_embedding", "pos_embed", "cls_token"))
            (stays if plain else decays).append(parameter)
    groups = [{"params": decays, "weight_decay": optim.weight_decay}, {"params": stays, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, optim: Optim, *, step: int, steps: int) -> float:
    """Give every group what the stage says about this step; returns the learning rate."""
    rate = optim.lr_at(step, steps)
    for place, group in enumerate(optimizer.param_groups):
        group["lr"] = rate
        group["betas"], group["eps"] = optim.betas, optim.eps
        group["weight_decay"] = optim.weight_decay if place == 0 else 0.0
    return rate
