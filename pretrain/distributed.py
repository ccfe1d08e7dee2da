"""The ranks that train together, and what they do together."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh

from datasets.errors import UserError
from pretrain.place import Place, job_here, place_here
from pretrain.rendezvous import RendezvousError, Wait, meet

_COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Ranks wait for rank zero while it judges the model."""


T = TypeVar("T")


class SaidByRankZeroError(UserError):
    """A mistake that rank zero reports; the others only leave."""


class RankZeroFailedError(RuntimeError):
    """A crash that rank zero reports; the others only leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among all that train together."""

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None
    """None for one process, which then needs no collective at all."""
    local: int = 1
    """Processes on this machine."""

    @property
    def zero(self) -> bool:
        """Whether this rank writes, prints and saves."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) of each rank -> (ranks, N), on every rank."""
        if self.group is None:
            return values[None]
        gathered = values.new_empty(self.world * len(values))
        dist.all_gather_into_tensor(gathered, values, group=self.group)
        return gathered.view(self.world, -1)

    def gather_objects(self, mine: T) -> list[T]:
        """What each rank has, on every rank."""
        if self.group is None:
            return [mine]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def on_zero(self, work: Callable[[], T]) -> T:
        """Do something on rank zero, and tell every rank what came of it.

        Raises:
            Exception: what `work` raised, on rank zero.
            SaidByRankZeroError: on the others, where that was a UserError.
            RankZeroFailedError: on the others, where it was anything else.
        """
        if self.group is None:
            return work()
        answer: list[Any] = [None, None]
        failure: Exception | None = None
        if self.zero:
            try:
                answer = [work(), None]
            except UserError as error:
                failure, answer = error, [None, SaidByRankZeroError(str(error))]
            except Exception as error:
                failure, answer = error, [None, RankZeroFailedError(f"{type(error).__name__}: {error}")]
        dist.broadcast_object_list(answer, src=0, group=self.group)
        if failure is not None:
            raise failure
        if answer[1] is not None:
            raise answer[1]
        return answer[0]


def shard_mesh(ranks: Ranks, *, by_node: bool) -> DeviceMesh:
    """The ranks as FSDP2 wants them: ("shard",), or ("replicate", "shard") with a row for each machine.

    Args:
        ranks: all of them; called by all at once.
        by_node: whether machines are rows, where there are several with equally many processes, and more
            than one each. Processes of a machine follow each other, as torchrun and srun number them.
    """
    assert ranks.group is not None
    kind, members = ranks.device.type, dist.get_process_group_ranks(ranks.group)
    beside = ranks.gather(torch.tensor([ranks.local], device=ranks.device)).flatten().tolist()
    row = beside[0]
    if not by_node or len(set(beside)) > 1 or not 1 < row < ranks.world or ranks.world % row:
        return DeviceMesh.from_group(ranks.group, kind, mesh_dim_names=("shard",))
    mesh = torch.tensor(members).view(-1, row)
    groups: list[dist.ProcessGroup] = []
    for lines in (mesh.T, mesh):
        mine, _ = dist.new_subgroups_by_enumeration(lines.tolist(), timeout=_COLLECTIVE_TIMEOUT)
        assert isinstance(mine, dist.ProcessGroup)
        groups.append(mine)
    return DeviceMesh.from_group(groups, kind, mesh=mesh, mesh_dim_names=("replicate", "shard"))


@contextmanager
def join_ranks(out: Path, *, asked: Callable[[], bool] = lambda: False) -> Generator[Ranks]:
    """Join the others that torchrun or srun has started, and leave them.

    Args:
        out: a directory that all ranks see, through which those that srun started find each other.
        asked: whether to stop waiting for them.

    Raises:
        RendezvousError: the other ranks do not come (names host and port).
        UserError: there are more than GPUs.
        LeftError: it was asked to stop before they had come.
    """
    place = place_here()
    device = _device(place)
    if place.world == 1:
        yield Ranks(rank=0, world=1, device=device, group=None)
        return
    wait = Wait.of_environment(asked)
    with meet(place, _door(out), wait) if place.by == "srun" else nullcontext() as store:
        _join(place, device, store, wait)
    try:
        group = dist.new_group(timeout=_COLLECTIVE_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        beside = place.beside or _beside(group)
        yield Ranks(rank=place.rank, world=place.world, device=device, group=group, local=beside)
    finally:
        dist.destroy_process_group()


def _join(place: Place, device: torch.device, store: Store | None, wait: Wait) -> None:
    timeout = timedelta(seconds=wait.seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        if store is None:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout
            )
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        words = f"rank {place.rank} of {place.world} found no rendezvous at {where}: {error}"
        # What is written wrong in the environment stays so, what did not answer may come back.
        raise (UserError if isinstance(error, ValueError) else RendezvousError)(words) from error


def _door(out: Path) -> Path:
    """Where rank zero of this job step says where it listens: another start has another file."""
    job = job_here()
    assert job is not None, "srun starts nothing outside a job"
    return out / "rendezvous" / f"{job.id}.{job.restart}.{job.step}.json"


def _device(place: Place) -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # With --gpus-per-task Slurm shows each task its own GPU alone, as number 0.
    number = 0 if place.by == "srun" and visible == 1 else place.local
    if number >= visible:
        raise UserError(
            f"rank {place.rank} would use GPU {number}, and this machine has {visible}: "
            "start as many processes as there are GPUs"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _beside(group: dist.ProcessGroup) -> int:
    """Processes on this machine, where nobody says so."""
    names: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(names, socket.gethostname(), group=group)
    return names.count(socket.gethostname())
