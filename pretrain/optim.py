"""The optimizer: which parameter decays, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from datasets.errors import UserError
from pretrain.zoo.head import VocabularyHead

_POSITIONS = ("positional_embedding", "pos_embed", "cls_token", "position", "latent")
"""How open_clip, timm and we call parameters that stand for places rather than map anything."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Optimizer with linear warm-up and cosine decay to zero over the stage."""

    kind: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon (orthogonalised momentum) for matrices beside AdamW for the rest; that of the first
    stage holds for the whole run."""
    lr: float = 3e-3
    """Peak learning rate."""
    warmup: int = 100
    """Steps from zero to the peak."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of AdamW's moments (CLIP's for a ViT)."""
    eps: float = 1e-6
    """Least divisor of an update (CLIP's for a ViT)."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors, positions and temperatures have none."""
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


def build_optimizer(module: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer over what trains, in four groups.

    Matrices decay, and are what Muon turns into orthogonal updates. Tables of token embeddings decay too,
    but their rows are looked up, not multiplied, and stay with AdamW, as do the vectors and positions, and
    the temperatures, which do not decay. These have a group of their own, because a fused step takes no
    shards beside what is not sharded. Muon is timm's, at AdamW's scale of learning rates.
    """
    looked_up = {
        id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding | VocabularyHead)
    }
    matrices: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    alone: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.numel() == 1:
            alone.append(parameter)
        elif parameter.ndim < 2 or name.endswith(_POSITIONS):
            plain.append(parameter)
        else:
            (tables if id(parameter) in looked_up else matrices).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "decays": True},
        {"params": tables, "decays": True, "use_fallback": True},
        {"params": plain, "decays": False, "use_fallback": True},
        {"params": alone, "decays": False, "use_fallback": True},
    ]
    if optim.kind == "muon":
        from timm.optim.muon import Muon

        return Muon(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, optim: Optim, *, step: int, steps: int) -> None:
    """Give every group what the stage says about this step."""
    for group in optimizer.param_groups:
        group["lr"] = optim.lr_at(step, steps)
        group["betas"], group["eps"] = optim.betas, optim.eps
        group["weight_decay"] = optim.weight_decay if group["decays"] else 0.0
