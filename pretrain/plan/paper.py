"""Tensors without numbers: a step takes its shapes and operators, and neither memory nor time.

Inside, a tensor of floating-point numbers is a size (torch's FakeTensor), and integers and truth values are
real: who is whose positive, how long a text is, and which rows a rank holds decide shapes, and there are few
of them. What would follow from numbers that are not there is chosen evenly: the negatives that a rank draws
are each of its own samples once.

Collectives are counted and not made. Every other rank is taken to do what this one does: integers that
number this rank's own things go on counting on the others, sums are multiplied by the ranks, and all else
is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from datasets.errors import UserError
from pretrain.memory import only_supposed
from pretrain.plan.outcomes import Outcomes

_SMALL = 64
"""Numbers of a tensor that is made of nothing else (a list of rates by depth) and stays real."""
_CPU = torch.device("cpu")
_Op = Callable[..., Any]


class Collective(NamedTuple):
    """One that this rank takes part in."""

    name: str
    sent: int
    """Bytes from this rank; those of a ring where it can be one."""
    ranks: tuple[int, ...]
    """Who takes part."""
    into: Tensor | None
    """What it fills."""

    def within(self, node: int) -> bool:
        """Whether all are on one machine, each of which has so many."""
        return len({rank // node for rank in self.ranks}) == 1


class Paper(TorchDispatchMode):
    """Inside, new tensors of floating-point numbers are sizes, and collectives are counted.

    Raises:
        UserError: an operator asks for a number that is not there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collective: Callable[[Collective], None] = lambda _: None
        """Told of every one."""
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._outcomes = Outcomes(self._fakes)
        self._chosen = 1
        self._own = {
            torch.ops.aten.index.Tensor: self._index,
            torch.ops.aten.index_put_.default: self._index,
            torch.ops.aten.index_put.default: self._index,
            torch.ops.aten.where.self: self._where,
            torch.ops.aten.max.dim: self._best,
            torch.ops.aten.min.dim: self._best,
            torch.ops.aten.argmax.default: self._best,
            torch.ops.aten.argmin.default: self._best,
        }

    def size(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor of a shape, without numbers."""
        return FakeTensor(self._fakes, torch.empty(shape, dtype=dtype, device="meta"), _CPU)

    def rewrite(self, module: nn.Module) -> None:
        """Make sizes of the parameters and buffers that are real, because they are small; ties stay."""
        known: dict[Tensor, Tensor] = {}
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, value in held.items():
                    if value is None or isinstance(value, FakeTensor) or not value.is_floating_point():
                        continue
                    if value not in known:
                        made = self.size(*value.shape, dtype=value.dtype)
                        trains = value.requires_grad
                        known[value] = nn.Parameter(made, trains) if held is part._parameters else made
                    held[name] = known[value]  # pyright: ignore[reportArgumentType]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what it makes of its shards comes by here
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked some times for every operator
        kwargs = kwargs or {}
        if only_supposed():
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            return self._collective(func, args)
        if any(issubclass(each, FakeTensor) for each in types):
            return self._own.get(func, self._unwritten)(func, args, kwargs)
        if any(isinstance(each, Tensor) for each in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        made = self._unwritten(func, args, kwargs)
        numbers = isinstance(made, Tensor) and made.is_floating_point() and made.numel() > _SMALL
        return made if numbers else func(*args, **kwargs)

    def _unwritten(self, func: _Op, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            return self._outcomes.of(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(
                f"this run cannot be planned on paper: {func} asks for the value of a number, and there are "
                "only sizes; leave out the objective or the part of the model that does"
            ) from error
        except UnsupportedFakeTensorException as error:
            raise UserError(f"this run cannot be planned on paper: {error}") from error

    def _index(self, func: _Op, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Truth values that are real choose rows as their places do."""
        places: list[Tensor | None] = []
        for each in args[1]:
            if each is None or isinstance(each, FakeTensor) or each.dtype != torch.bool:
                places.append(each)
            else:
                places += each.nonzero().unbind(1)
        return self._unwritten(func, (args[0], places, *args[2:]), kwargs)

    def _where(self, func: _Op, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Of two real integers the first."""
        made = self._unwritten(func, args, kwargs)
        if any(isinstance(each, FakeTensor) for each in args[1:]) or made.is_floating_point():
            return made
        return args[1].expand(made.shape).clone()

    def _best(self, func: _Op, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The places of the largest are spread evenly over this rank's part of where they may be."""
        made = self._unwritten(func, args, kwargs)
        dim = args[1] if len(args) > 1 and args[1] is not None else kwargs.get("dim")
        among = args[0].shape[dim] if dim is not None else args[0].numel()
        ours = max(1, among // (dist.get_world_size() if dist.is_initialized() else 1))

        def next_ones(value: Tensor) -> Tensor:
            if value.is_floating_point():
                return value
            self._chosen += value.numel()
            return (torch.arange(self._chosen - value.numel(), self._chosen) % ours).view(value.shape)

        return tree_map(next_ones, made)

    def _collective(self, func: _Op, args: Sequence[Any]) -> Any:
        """Count it, and say what the other ranks would."""
        name = func.__name__.split(".")[0].strip("_")
        group = next(each for each in args if isinstance(each, torch.ScriptObject))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))  # pyright: ignore
        world = len(ranks)
        ours = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
        into = args[0] if isinstance(args[0], Tensor) else None
        given = args[1] if into is not None and isinstance(args[1], Tensor) else ours[0]
        self.collective(Collective(name, _ring(name, ours, given, world), ranks, into))
        if name == "allreduce":  # a sum: what takes a maximum has no numbers here
            for each in ours:
                if not isinstance(each, FakeTensor):
                    each.mul_(world)
        elif name == "allgather_base" and into is not None and not isinstance(into, FakeTensor):
            into.copy_(_everyone(given, world).view_as(into))
        elif name == "allgather":  # DistributedDataParallel compares shapes with it
            for each in tree_leaves(args[0]):
                each.copy_(args[1][0])
        elif name == "alltoall_base" and into is not None and not isinstance(into, FakeTensor):
            into.zero_()
        # What comes back is a handle to wait with; the tensors of the call are never looked at.
        stood = [[] if name == "alltoall_base" and isinstance(each, list) else each for each in args]
        return func(*tree_map(lambda each: torch.empty(0) if isinstance(each, Tensor) else each, stood))


def _ring(name: str, ours: Sequence[Tensor], given: Tensor, world: int) -> int:
    """Bytes that a rank sends."""
    if name.startswith("allreduce"):
        return round(2 * (world - 1) / world * sum(each.nbytes for each in ours))
    if name.startswith("allgather"):
        return (world - 1) * given.nbytes
    if name.startswith(("reduce_scatter", "alltoall")):
        return round((world - 1) / world * given.nbytes)
    return given.nbytes if name.startswith("broadcast") else 0


def _everyone(mine: Tensor, world: int) -> Tensor:
    """What all ranks have together where we have this."""
    everyone = mine.expand(world, *mine.shape).clone()
    if mine.dtype == torch.int64 and mine.numel() > 1:
        columns = everyone.view(world, len(mine), -1)
        for place, column in enumerate(mine.view(len(mine), -1).unbind(1)):
            if _numbers(column):
                columns[:, :, place] += torch.arange(world)[:, None] * (int(column.max()) + 1)
    return everyone


def _numbers(column: Tensor) -> bool:
    """Whether these number things of this rank: 0, 1, 2, ..., some perhaps again."""
    distinct = column.unique()
    return torch.equal(distinct, torch.arange(len(distinct)))


@contextmanager
def pretended(world: int) -> Generator[dist.ProcessGroup | None]:
    """A group of so many ranks of which only this one is here; None for one. Inside another, the same.

    Raises:
        UserError: this process is one of several already.
    """
    if world == 1:
        yield None
        return
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    known = dist.group.WORLD
    if known is not None:
        if dist.get_backend(known) != "fake":
            raise UserError("--plan is for one process: start it without torchrun")
        assert known.size() == world
        yield known
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        group = dist.group.WORLD
        assert isinstance(group, dist.ProcessGroup)
        yield group
    finally:
        # What torch remembers of shards names the first mesh of their shape: here, one whose rank is zero.
        _clear_sharding_prop_cache()
        dist.destroy_process_group()
