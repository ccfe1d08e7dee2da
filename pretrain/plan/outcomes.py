"""What an operator makes of sizes, found once for every shape that it meets.

A tower is a stack of equal blocks, so most operators come again with the shapes of before. torch's own cache
(FakeTensorMode) finds them too, but also looks for symbolic shapes, which takes most of a plan's time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pretrain.memory import place_of

_CPU = torch.device("cpu")
_UNKNOWN = object()


class _Made(NamedTuple):
    """A tensor that an operator made."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    of: int | None
    """Which tensor of the call it looks at; None: it is new."""
    same: bool
    """Whether it is that tensor itself."""


class Outcomes:
    """Runs operators on sizes."""

    _known: ClassVar[dict[Hashable, Any]] = {}
    """Of all trials: nothing in it is of one of them."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        self._fakes = fakes

    def of(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What an operator makes.

        Raises:
            DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException: shapes
                do not say it.
        """
        tensors: list[Tensor] = []
        given = _signature(args, tensors), _signature(tuple(kwargs.items()), tensors)
        call = func, *given, torch.get_default_dtype()
        try:
            known = self._known.get(call, _UNKNOWN)
        except TypeError:  # an argument that cannot be looked up
            known = call = None
        if call is not None and known is not _UNKNOWN:
            return self._again(known, tensors)
        with self._fakes:
            made = func(*args, **kwargs)
        if call is not None and _follows(func, tensors):
            found = _described(made, tensors)
            if found is not _UNKNOWN:
                self._known[call] = found
        return made

    def _again(self, known: Any, tensors: Sequence[Tensor]) -> Any:
        if isinstance(known, list | tuple) and not isinstance(known, _Made):
            return type(known)(self._again(each, tensors) for each in known)
        if known is None:
            return None
        if known.of is None:
            made = torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta")
        elif known.same:
            return tensors[known.of]
        else:
            storage = tensors[known.of].untyped_storage()
            made = torch.empty(0, dtype=known.dtype, device="meta")
            made.set_(storage, known.offset, known.shape, known.stride)
        return FakeTensor(self._fakes, made, _CPU)


def _signature(value: Any, tensors: list[Tensor]) -> Hashable:
    """What of an argument decides what is made; its tensors are added to the others."""
    if isinstance(value, FakeTensor):
        tensors.append(value)
        constant = value.constant is not None
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device, constant
    if isinstance(value, list | tuple):
        return tuple([_signature(each, tensors) for each in value])
    if isinstance(value, Tensor):
        tensors.append(value)
    return type(value), value  # 1, 1.0 and True are equal, and make tensors of different types


def _follows(func: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether shapes say all: nothing that is made depends on what is there beside them."""
    return (
        torch.Tag.inplace_view not in func.tags
        and all(isinstance(each, FakeTensor) and each.constant is None for each in tensors)
        and len({id(each) for each in tensors}) == len(tensors)
    )


def _described(made: Any, tensors: Sequence[Tensor]) -> Any:
    """The same with a description for each tensor."""
    if made is None:
        return None
    if isinstance(made, list | tuple):
        each = [_described(one, tensors) for one in made]
        new = [place_of(one) for one, found in zip(made, each, strict=True) if _is_new(found)]
        return _UNKNOWN if _UNKNOWN in each or len(set(new)) < len(new) else type(made)(each)
    if not isinstance(made, FakeTensor) or made.constant is not None or made.fake_device != _CPU:
        return _UNKNOWN
    of = [at for at, each in enumerate(tensors) if place_of(each) == place_of(made)]
    same = [at for at, each in enumerate(tensors) if each is made]
    if len(of) > 1 and not same:
        return _UNKNOWN
    if not of:  # made again it has no more than its shape needs
        least = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device="meta")
        if made.storage_offset() or made.untyped_storage().nbytes() != least.untyped_storage().nbytes():
            return _UNKNOWN
    at = (same or of or [None])[0]
    return _Made(made.shape, made.stride(), int(made.storage_offset()), made.dtype, at, bool(same))


def _is_new(found: Any) -> bool:
    return isinstance(found, _Made) and found.of is None
