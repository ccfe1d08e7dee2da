"""The norm of the gradient, whole and by tower, and its bound, however the parameters are sharded; towers."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from pretrain.pretrainer import Pretrainer


class Norms(NamedTuple):
    """Gradient norms before clipping."""

    whole: Tensor
    """()"""
    by_tower: dict[str, Tensor]
    """() of each tower, and of what belongs to none (`objectives`: temperatures, heads)."""


def gradient_norms(pretrainer: Pretrainer) -> Norms:
    """The norms of the gradient as it stands: with shards, one sum over ranks for all towers together."""
    plain: dict[str, list[Tensor]] = {}
    shards: dict[str, list[DTensor]] = {}
    device = pretrainer.model.logit_scale.device
    for name, parameter in pretrainer.named_parameters():
        if isinstance(parameter.grad, DTensor):
            shards.setdefault(tower_of(name), []).append(parameter.grad)
        elif parameter.grad is not None:
            plain.setdefault(tower_of(name), []).append(parameter.grad)
    norms = {tower: _norm(gradients, device) for tower, gradients in plain.items()}
    if shards:
        for tower, square in zip(shards, _squares_of_shards(shards, pretrainer), strict=True):
            both = square if tower not in norms else norms[tower].double().square() + square
            norms[tower] = both.sqrt().to(torch.promote_types(shards[tower][0].dtype, torch.float32))
    if not norms:  # sources that feed only what is frozen
        return Norms(torch.zeros((), device=device), norms)
    return Norms(torch.linalg.vector_norm(torch.stack(list(norms.values()))), norms)


def clip(pretrainer: Pretrainer, norm: Tensor, *, largest: float) -> None:
    """Shorten a gradient of this norm to `largest` (0: not at all)."""
    if not largest:
        return
    # Local tensors: each rank shortens what it holds. With offloading they are on several devices.
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in pretrainer.parameters():
        if parameter.grad is not None:
            local = _local(parameter.grad)
            by_device.setdefault(local.device, []).append(local)
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)  # as clip_grads_with_norm_ has it
    for device, gradients in by_device.items():
        torch._foreach_mul_(gradients, factor.to(device))  # pyright: ignore[reportPrivateImportUsage]


def _squares_of_shards(shards: dict[str, list[DTensor]], pretrainer: Pretrainer) -> Tensor:
    """(towers,) float64 squared norms of what is sharded, the same bits on every rank."""
    device = pretrainer.model.logit_scale.device
    squares = [_norm([g.to_local() for g in each], device).double().square() for each in shards.values()]
    one = next(iter(shards.values()))[0]
    held = zip(one.placements, one.device_mesh.shape, strict=True)
    copies = prod(size for placement, size in held if isinstance(placement, Replicate))
    total = torch.stack(squares) / copies
    dist.all_reduce(total, group=pretrainer.group)
    return total


def _norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """() at least float32."""
    if any(gradient.dtype == torch.bfloat16 for gradient in gradients):
        gradients = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.nn.utils.get_total_norm(gradients).to(device)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def tower_of(parameter: str) -> str:
    """`model.image.trunk.norm.weight` is the image tower's; a temperature is no tower's."""
    _, part, *inside = parameter.split(".")
    return part if parameter.startswith("model.") and inside else "objectives"


def by_part(pretrainer: Pretrainer) -> dict[str, tuple[int, int]]:
    """Parameters, and those of them that train, of each tower and of what belongs to none."""
    parts: dict[str, tuple[int, int]] = {}
    for name, each in pretrainer.named_parameters():
        part = tower_of(name)
        size, trained = parts.get(part, (0, 0))
        parts[part] = size + each.numel(), trained + each.numel() * each.requires_grad
    return parts
