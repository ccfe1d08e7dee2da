"""The moving average of the weights: what is judged and exported, beside what is trained.

The update is torch's own (torch.optim.swa_utils): average <- decay average + (1 - decay) weight, from the
weights as they are when it begins. It is elementwise, so each rank averages the parts that it holds.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pretrain.pieces import Saved


class Ema:
    """An average of what trains, in at least float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Begin with the weights as they are.

        Args:
            module: a `Pretrainer` as it is wrapped; what is frozen is left out.
            decay: of what is averaged, 0 < decay < 1.
        """
        self._weights = {name: each for name, each in module.named_parameters() if each.requires_grad}
        self.averages: dict[str, Tensor] = {}
        """By parameter name, sharded as the parameter is."""
        for name, weight in self._weights.items():
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.averages[name] = weight.detach().to(dtype, copy=True)
        self._update = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Take in the weights of an optimizer step that was made."""
        # Local tensors, and lists of one device and type: what the operations on lists are made for.
        together: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for name, weight in self._weights.items():
            average = _local(self.averages[name])
            averages, weights = together.setdefault((average.device, average.dtype), ([], []))
            averages.append(average)
            weights.append(_local(weight).detach().to(average.dtype))
        for averages, weights in together.values():
            self._update(averages, weights, 0)

    def restore(self, saved: Saved | None) -> None:
        """Go on with averages that were saved; others, as of what did not train then, begin with the weights.

        Args:
            saved: of a checkpoint, whose weights are in the module by now; None if it has no averages.
        """
        known = set(saved or ())
        for name, average in self.averages.items():
            if saved is not None and name in known:
                average.copy_(saved.like(name, average))
            else:
                average.copy_(self._weights[name].detach())

    @contextmanager
    def swapped(self) -> Generator[None]:
        """Inside, the weights are the averages; afterwards they are what they were, to the bit.

        Whole parameters of shards (`Wrapped.whole`) have to be gathered inside of it.
        """
        with torch.no_grad():
            kept = {name: _local(weight).detach().clone() for name, weight in self._weights.items()}
            self._put(self.averages)
        try:
            yield
        finally:
            with torch.no_grad():
                self._put(kept)

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            _local(weight).copy_(_local(values[name]))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
