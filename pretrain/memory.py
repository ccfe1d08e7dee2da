"""Bytes of tensors that are alive, counted as operators make them: the same on every device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Counts the storages that are made inside, as long as they live.

    What was there before does not count, nor does what a kernel needs for itself while it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        """Alive now."""
        self.peak = 0
        """The most that were alive at once."""
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what it makes of its shards comes by here
        made = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # only asked where a tensor is
            return made
        given = {place_of(each) for each in tree_leaves((args, kwargs)) if _is_real(each)}
        for each in tree_leaves(made):
            if _is_real(each) and place_of(each) not in given:
                self._count(each.untyped_storage())
        if func.namespace in ("fsdp", "c10d"):  # FSDP2 empties storages and fills them again
            for storage in self._known:
                self._changed(storage._cdata, storage.nbytes())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self._changed(storage._cdata, storage.nbytes())
        weakref.finalize(storage, self._changed, storage._cdata, 0)

    def _changed(self, place: int, size: int) -> None:
        """A storage has another size than before: none, where it is new or gone."""
        self.bytes += size - self._sizes.pop(place, 0)
        self.peak = max(self.peak, self.bytes)
        if size:
            self._sizes[place] = size


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def place_of(tensor: Tensor) -> int:
    """Where its storage is: a view has that of what it looks at; not its address, which is 0 on paper."""
    return tensor.untyped_storage()._cdata
