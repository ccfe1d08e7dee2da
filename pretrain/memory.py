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
        self._lent: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        """What FSDP2 works with: it empties storages and fills them again."""
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device  # asked some times for every operator on sizes
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what it makes of its shards comes by here
        made = func(*args, **(kwargs or {}))
        if only_supposed():  # takes no memory
            return made
        self._find_new(made, (args, kwargs))
        if func.namespace == "fsdp":
            self._lent.update(
                each.untyped_storage() for each in tree_leaves((args, kwargs)) if _is_real(each)
            )
        if func.namespace in ("fsdp", "c10d"):
            for storage in self._lent & self._known:
                self._changed(storage._cdata, storage.nbytes())
        return made

    def _find_new(self, made: Any, given: Any) -> None:
        """Count what an operator made that was not given to it."""
        old: set[int] | None = None
        for each in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if not _is_real(each) or (storage := each.untyped_storage()) in self._known:
                continue
            if old is None:
                old = {place_of(each) for each in tree_leaves(given) if _is_real(each)}
            if storage._cdata not in old:
                self._count(storage)

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        self._changed(storage._cdata, storage.nbytes())
        weakref.finalize(storage, self._changed, storage._cdata, 0)

    def _changed(self, place: int, size: int) -> None:
        """A storage has another size than before: none, where it is new or gone."""
        self.bytes += size - self._sizes.pop(place, 0)
        self.peak = max(self.peak, self.bytes)
        if size:
            self._sizes[place] = size


def only_supposed() -> bool:
    """Whether torch asks an operator for shapes alone, as it does for a DTensor's whole."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"


def place_of(tensor: Tensor) -> int:
    """Where its storage is: a view has that of what it looks at; not its address, which is 0 on paper."""
    return tensor.untyped_storage()._cdata
