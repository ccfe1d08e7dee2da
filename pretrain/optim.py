"""The optimizer: which parameter decays, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from datasets.errors import UserError
from pretrain.layers import layer_scales
from pretrain.schedules import Schedule, cooling, cosine, linear, rsqrt, stepped
from pretrain.zoo.head import VocabularyHead

_POSITIONS = ("positional_embedding", "pos_embed", "cls_token", "position", "latent")
"""How open_clip, timm and we call parameters that stand for places rather than map anything."""
_COOLED: tuple[Schedule, ...] = ("rsqrt", "wsd")
_CLIPPED = ("adamw", "adafactor")
_FACTORED = 32
"""Adafactor keeps two vectors for a matrix of which both sides are at least this (big_vision's default)."""

Kind = Literal["adamw", "lamb", "lion", "adafactor", "muon"]


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Optimizer with linear warm-up and a schedule over the stage."""

    kind: Kind = "adamw"
    """AdamW; LAMB (steps in proportion to the weights, for very large batches); Lion (the sign of the
    momentum: take a tenth of AdamW's lr and ten times its decay); Adafactor as big_vision has it (factored
    second moments, momentum in bf16); or Muon (orthogonalised momentum) for matrices beside AdamW for the
    rest."""
    lr: float = 3e-3
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """How it falls after the warm-up: cosine and linear to the end of the stage; rsqrt, one over the square
    root of time; wsd, not before the cooldown; step, at milestones; constant."""
    warmup: int = 100
    """Steps from zero to the peak."""
    cooldown: int = 0
    """rsqrt and wsd: last steps, in which it falls in a straight line to the floor."""
    timescale: int = 10_000
    """rsqrt: steps after the warm-up until it has fallen to 1/sqrt(2)."""
    milestones: tuple[int, ...] = ()
    """step: steps of the stage at which it is multiplied by the factor."""
    factor: float = 0.1
    """step: by what it is multiplied at each milestone."""
    floor: float = 0.0
    """Learning rate towards which it falls."""
    layer_decay: float = 1.0
    """Of the image tower: each layer learns this much slower than the one above it (BEiT, arXiv 2106.08254);
    1 for all alike."""
    text_layer_decay: float = 1.0
    """The same of the text tower."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the moments (CLIP's for a ViT); of Adafactor, the momentum's and the largest that the second
    moment's comes to."""
    eps: float = 1e-6
    """Least divisor of an update (CLIP's for a ViT); Lion and Adafactor have none to choose."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; vectors, positions and temperatures have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 leaves it alone."""
    update_clip: float = 0.0
    """adamw and adafactor: largest root mean square of one tensor's update before the learning rate
    (1 in StableAdamW, arXiv 2304.13013); 0 leaves it alone."""

    def check(self, flag: str, *, steps: int) -> None:
        """Refuse what no optimizer can run with, and what a stage of so many steps would not read.

        Raises:
            UserError: names the flag, of which `flag` is the beginning.
        """
        for key in ("lr", "eps", "factor", "timescale"):
            if not 0 < getattr(self, key) < math.inf:
                raise UserError(f"{flag}.{key} is {getattr(self, key)}; it must be a number above 0")
        for key in ("warmup", "cooldown", "floor", "weight_decay", "clip", "update_clip"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"{flag}.{key} is {getattr(self, key)}; it must be a number of at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"{flag}.betas are {self.betas}; both must lie in 0..1, below 1")
        for key in ("layer_decay", "text_layer_decay"):
            if not 0 < getattr(self, key) <= 1:
                raise UserError(f"{flag}.{key} is {getattr(self, key)}; it must lie above 0 and not above 1")
        if self.floor > self.lr:
            raise UserError(f"{flag}.floor is {self.floor}, above the peak {self.lr}: lower it")
        if self.update_clip and self.kind not in _CLIPPED:
            raise UserError(
                f"{flag}.update_clip goes with {' and '.join(_CLIPPED)}: the updates of {self.kind} have a "
                "size of their own; leave it out"
            )
        self._check_schedule(flag, steps)

    def _check_schedule(self, flag: str, steps: int) -> None:
        if self.cooldown and self.schedule not in _COOLED:
            raise UserError(
                f"{flag}.cooldown goes with {' and '.join(_COOLED)}, and {flag}.schedule is {self.schedule}: "
                "leave it out"
            )
        if self.schedule == "wsd" and not self.cooldown:
            raise UserError(f"{flag}.schedule wsd needs a {flag}.cooldown: the steps of its decay")
        if bool(self.milestones) != (self.schedule == "step"):
            raise UserError(
                f"{flag}.milestones are {self.milestones} and {flag}.schedule is {self.schedule}: step needs "
                "some, and the others have none"
            )
        if self.milestones and (
            self.milestones[0] < 1 or list(self.milestones) != sorted(set(self.milestones))
        ):
            raise UserError(f"{flag}.milestones are {self.milestones}; they must rise, from at least 1")
        if self.cooldown > steps or max(self.milestones, default=0) >= steps:
            raise UserError(
                f"{flag} has a cooldown of {self.cooldown} and milestones {self.milestones}, for which a "
                f"stage of {steps} steps is too short: change them, or give it more steps"
            )

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of 0 <= step < steps, of a parameter whose scale is 1."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.floor + (self.lr - self.floor) * self._share_at(step, steps)

    def _share_at(self, step: int, steps: int) -> float:
        """Of the way from the floor to the peak, after the warm-up."""
        past = step - self.warmup
        done = past / max(1, steps - self.warmup)
        match self.schedule:
            case "cosine":
                return cosine(done)
            case "linear":
                return linear(done)
            case "step":
                return stepped(step, milestones=self.milestones, factor=self.factor)
            case "rsqrt":
                share = rsqrt(past, timescale=self.timescale)
            case "wsd" | "constant":
                share = 1.0
        return share * cooling(steps - step, cooldown=self.cooldown)


def build_optimizer(
    module: nn.Module, optim: Optim, multipliers: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer over what trains, in groups of one kind and one scale of the learning rate.

    Matrices decay, and are what Muon turns into orthogonal updates. Tables of token embeddings decay too,
    but their rows are looked up, not multiplied, and stay with AdamW, as do the vectors and positions, and
    the temperatures, which do not decay. These have a group of their own, because a fused step takes no
    shards beside what is not sharded.

    AdamW is torch's, fused. With an update clip it is timm's, which is not fused, and clips as StableAdamW
    does but for the decay, which it leaves as it is; torch has no such clip outside of its Adafactor. The
    others are timm's too: Muon at AdamW's scale of learning rates, LAMB without a clip of its own. Of
    shards, Adafactor gathers one gradient at a time, for its means over rows and columns.

    Args:
        module: wrapped, as it will be trained.
        optim: the stage's.
        multipliers: of the learning rate, by parameter (`set_trainable`); 1 where one is not named.

    Raises:
        UserError: it has a layer decay for a tower whose layers are not known.
    """
    layers = layer_scales(module, image=optim.layer_decay, text=optim.text_layer_decay)
    looked_up = {
        id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding | VocabularyHead)
    }
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.numel() == 1:
            kind = "alone"
        elif parameter.ndim < 2 or name.endswith(_POSITIONS):
            kind = "plain"
        else:
            kind = "table" if id(parameter) in looked_up else "matrix"
        scale = (multipliers or {}).get(name, 1.0) * layers.get(name, 1.0)
        group = groups.setdefault((kind, scale), {"params": [], "scale": scale})
        group["decays"] = kind in ("table", "matrix")
        if kind != "matrix":
            group["use_fallback"] = True
        group["params"].append(parameter)
    return _make(list(groups.values()), optim)


def _make(groups: list[dict[str, Any]], optim: Optim) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": optim.lr, **_options(optim)}
    if optim.kind == "adamw" and not optim.update_clip:
        return torch.optim.AdamW(groups, fused=True, **options)
    if optim.kind == "muon":
        from timm.optim.muon import Muon

        return Muon(groups, **options)
    if optim.kind == "adafactor":
        from timm.optim.adafactor_bv import AdafactorBigVision

        return AdafactorBigVision(groups, min_dim_size_to_factor=_FACTORED, **options)
    if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
        # Of shards, some operations on lists are not known (Lion's in torch 2.11, all of an update clip's).
        options["foreach"] = False
    if optim.kind == "lamb":
        from timm.optim.lamb import Lamb

        for group in groups:
            group["step"] = torch.zeros(())  # as timm makes it; so that a restart finds it (state.py)
        return Lamb(groups, max_grad_norm=None, **options)
    if optim.kind == "lion":
        from timm.optim.lion import Lion

        return Lion(groups, **options)
    from timm.optim.adamw import AdamWLegacy

    return AdamWLegacy(groups, **options)


def _options(optim: Optim) -> dict[str, Any]:
    """What a stage says about the updates, under the names that the optimizer of its kind has for it."""
    clip = {"clipping_threshold": optim.update_clip} if optim.update_clip else {}
    if optim.kind == "adafactor":
        return {"momentum": optim.betas[0] or None, "beta2_cap": optim.betas[1], **clip}
    if optim.kind == "lion":
        return {"betas": optim.betas}
    return {"betas": optim.betas, "eps": optim.eps, **clip}


def set_rate(optimizer: torch.optim.Optimizer, optim: Optim, *, step: int, steps: int) -> None:
    """Give every group what the stage says about this step."""
    rate, options = optim.lr_at(step, steps), _options(optim)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
        group["weight_decay"] = optim.weight_decay if group["decays"] else 0.0
        group.update(options)


def bytes_kept(optimizer: torch.optim.Optimizer, kind: Kind) -> int:
    """What the optimizer keeps of its parameters after the first step, without the counts of steps."""
    kept = 0
    for group in optimizer.param_groups:
        for each in group["params"]:
            if kind == "adafactor":
                kept += _second_bytes(each) + (2 * each.numel() if group["momentum"] is not None else 0)
            else:
                single = kind == "lion" or (kind == "muon" and not group.get("use_fallback"))
                kept += each.nbytes * (1 if single else 2)
    return kept


def _second_bytes(parameter: nn.Parameter) -> int:
    """Of Adafactor's second moments: one number for each row and each column of the two longest sides."""
    *_, short, long = sorted((1, 1, *parameter.shape))
    if parameter.ndim < 2 or short < _FACTORED:
        return parameter.nbytes
    return parameter.nbytes // short + parameter.nbytes // long
