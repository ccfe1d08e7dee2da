"""FSDP2: each rank holds a part of every parameter, of its gradient and of its moments.

A block is a unit: its parameters are gathered for its forward and again for its backward, and its gradient
is scattered where it arises, micro-batch by micro-batch: waiting for the last one would keep a whole
gradient on every rank. All else (embeddings, heads, poolers: what is read outside of a block's `forward`)
belongs to the pretrainer's own unit, which is whole from the beginning of a forward to the end of its
backward. A source that reaches no parameter of a unit runs it on no rank, because every rank has the same
sources in a step.

Parameters of one number (temperatures) are not sharded: every rank keeps them, in float32, and their
gradients meet in one sum at the end of the step.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from pretrain.distributed import Ranks, shard_mesh
from pretrain.parallel import Spread, Wrapped, same_on_all
from pretrain.pretrainer import Pretrainer

_MULTIPLIED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
"""Modules whose `weight` (or `in_proj_weight`) autocast rounds to its type whenever it is used."""


class Sharded(Wrapped):
    """A pretrainer whose parameters are shared out among the ranks."""

    def __init__(
        self, pretrainer: Pretrainer, ranks: Ranks, *, units: Sequence[nn.Module], spread: Spread, bf16: bool
    ) -> None:
        """Shard it in place.

        Args:
            pretrainer: on this rank's device, whole.
            ranks: among whom.
            units: what is gathered at a time.
            spread: how.
            bf16: whether forwards run under bf16 autocast.
        """
        super().__init__(pretrainer, ranks)
        self.divided = ranks.world
        self._alone = [parameter for parameter in pretrainer.parameters() if parameter.numel() == 1]
        same_on_all(pretrainer, ranks)
        options: dict[str, Any] = {
            "mesh": shard_mesh(ranks, by_node=spread.shard == "node"),
            "ignored_params": set(self._alone),
        }
        if spread.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
        for unit in units:
            fully_shard(unit, mp_policy=_policy(unit, bf16=bf16), **options)
        fully_shard(pretrainer, mp_policy=_policy(pretrainer, bf16=False), **options)
        self._units = [module for module in pretrainer.modules() if isinstance(module, FSDPModule)]

    def finish(self, pull: Mapping[str, Tensor]) -> None:
        """Bring the gradients of what is not sharded together, as FSDP2 does with the others: their mean."""
        super().finish(pull)
        found = [parameter.grad for parameter in self._alone if parameter.grad is not None]
        if found:
            mean = self.ranks.sum(torch.cat(found)) / self.divided
            for gradient, value in zip(found, mean.split(1), strict=True):
                gradient.copy_(value)

    @contextmanager
    def whole(self) -> Generator[None]:
        """Every rank has all parameters inside, and may run any part of the model without the others."""
        with torch.no_grad():
            # Of no objective: so that FSDP2 knows its root, even before the first step.
            self(None, phase="encode", names=(), factors={}, key=())
        for unit in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in self._units:
                unit.set_reshard_after_forward(unit is not cast(Any, self.pretrainer), recurse=False)
                unit.reshard()


def _policy(unit: nn.Module, *, bf16: bool) -> MixedPrecisionPolicy:
    """What parameters travel as: under autocast, those that it rounds to bf16 are rounded before.

    The result is the same, half of the bytes are sent, and nothing is rounded on every rank. Gradients meet
    in float32, and so do those of parameters that are kept in bf16.
    """
    if any(parameter.dtype == torch.bfloat16 for parameter in unit.parameters()):
        return MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    # torch before 2.15 has one type for all parameters of a unit: there, they travel as they are.
    if not bf16 or "param_dtype_override_fn" not in {field.name for field in fields(MixedPrecisionPolicy)}:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    rounded = {
        id(weight)
        for module in unit.modules()
        if isinstance(module, _MULTIPLIED)
        for name, weight in module.named_parameters(recurse=False)
        if name.endswith("weight")
    }
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        cast_forward_inputs=False,
        param_dtype_override_fn=lambda parameter: None if id(parameter) in rounded else parameter.dtype,
    )
