"""A checkpoint of any number of ranks, whole or sharded, is taken up by any other, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pretrain import checkpoint
from pretrain.distributed import Ranks
from pretrain.pieces import stage
from pretrain.state import capture, restore


class Tiny(nn.Module):
    """Sizes that no number of ranks divides, fewer rows than ranks, a buffer, a number, tied weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 7)
        self.narrow = nn.Linear(7, 2)
        self.scale = nn.Parameter(torch.zeros(1))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.coarse = nn.Linear(3, 5, bias=False, dtype=torch.bfloat16)
        self.register_buffer("places", torch.arange(4))

    def forward(self, tokens):
        said = (
            self.head(self.embed(tokens)).sum()
            + self.coarse(torch.ones(2, 3).bfloat16()).float().pow(2).sum()
        )
        return said + self.narrow(self.body(self.embed(tokens)).tanh()).sum() * self.scale.exp()


_MESHES: dict[tuple[int, str], DeviceMesh] = {}


def mesh_of(ranks: Ranks, layout: str) -> DeviceMesh:
    """All ranks in a row, or in two rows that hold the same."""
    at = ranks.world, layout
    if at not in _MESHES and layout == "fsdp":
        assert ranks.group is not None
        _MESHES[at] = DeviceMesh.from_group(ranks.group, "cpu")
    elif at not in _MESHES:
        rows = torch.arange(ranks.world).view(2, -1)
        groups: list[Any] = [dist.new_subgroups_by_enumeration(line.tolist())[0] for line in (rows.T, rows)]
        names = ("replicate", "shard")
        _MESHES[at] = DeviceMesh.from_group(groups, "cpu", mesh=rows, mesh_dim_names=names)
    return _MESHES[at]


def built(ranks: Ranks, layout: str, *, seed: int = 0):
    """A module and its optimizer after two steps; seed 0 is what is saved."""
    torch.manual_seed(seed)
    model = Tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    call = model
    if ranks.group is not None and layout != "ddp":
        mesh = mesh_of(ranks, layout)
        for part in (model.body, model.coarse):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif ranks.group is not None:
        call = DistributedDataParallel(model, process_group=ranks.group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for step in range(2):
        optimizer.zero_grad()
        call(torch.tensor([[step, 3, 7 + seed]])).backward()
        optimizer.step()
    return model, optimizer


def bits(named) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What can be compared and sent: type, shape and bytes of each whole tensor."""
    wholes = {
        f"{group}/{name}": each.full_tensor() if isinstance(each, DTensor) else each
        for group, tensors in named.items()
        for name, each in tensors.items()
    }
    return {
        name: (
            str(each.dtype),
            tuple(each.shape),
            each.detach().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, each in wholes.items()
    }


def write(ranks: Ranks, folder: Path, step: int, model, optimizer) -> None:
    beside = ranks.on_zero(lambda: checkpoint.begin(folder, step))
    assert beside is not None
    named = capture(model, optimizer)
    staged = {group: stage(tensors, zero=ranks.zero) for group, tensors in named.items()}
    state = {"step": step} if ranks.zero else None
    files = checkpoint.write_part(beside, staged, rank=ranks.rank, state=state)
    parts = ranks.gather_objects(files)
    ranks.on_zero(lambda: checkpoint.commit(beside, {k: v for part in parts for k, v in part.items()}))


def save_on_ranks(ranks: Ranks, *, folder: Path, layout: str):
    model, optimizer = built(ranks, layout)
    write(ranks, folder, 2, model, optimizer)
    return bits(capture(model, optimizer))


def take_up_on_ranks(ranks: Ranks, *, folder: Path, layout: str, step: int):
    """What another model holds once it has taken up a checkpoint; it writes the next one itself."""
    model, optimizer = built(ranks, layout, seed=1)
    found = checkpoint.Checkpoint(folder / f"step-{step:08d}", step)
    restore(found.tensors(), model, optimizer)
    for parameter in model.parameters():
        moment = optimizer.state[parameter]["exp_avg"]
        assert type(moment) is (DTensor if isinstance(parameter, DTensor) else torch.Tensor)
    assert model.head.weight is model.embed.weight
    write(ranks, folder, step + 1, model, optimizer)
    return bits(capture(model, optimizer))


CHAINS = {
    "4, 2, 1, 4": [("fsdp", 4), ("fsdp", 2), ("fsdp", 1), ("fsdp", 4)],
    "between wrappers": [("fsdp", 2), ("ddp", 4), ("fsdp", 4), ("ddp", 1), ("fsdp", 2), ("ddp", 2)],
    "several nodes": [
        ("ddp", 1),
        ("fsdp of two nodes", 4),
        ("ddp", 2),
        ("fsdp of two nodes", 4),
        ("fsdp", 2),
    ],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_parameters_and_moments_go_bit_for_bit_from_layout_to_layout(pool, tmp_path, chain):
    (layout, world), *others = CHAINS[chain]
    first = pool.run(save_on_ranks, world, folder=tmp_path, layout=layout)[0]
    assert len(first) == 9 + 3 * 7  # head.weight and embed.weight are one parameter under two names
    for step, (layout, world) in enumerate(others, start=2):
        for found in pool.run(take_up_on_ranks, world, folder=tmp_path, layout=layout, step=step):
            assert found == first, (layout, world)
    found = checkpoint.find(tmp_path, report=print)
    assert found is not None
    assert bits(found.load().tensors) == first
