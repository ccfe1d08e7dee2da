"""Every kind of optimizer goes on from a checkpoint as if nothing had happened, whole and in shards."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pretrain import checkpoint
from pretrain.distributed import Ranks
from pretrain.optim import Optim, build_optimizer, bytes_kept, set_rate
from pretrain.parallel import Spread, wrap
from pretrain.pieces import stage
from pretrain.precision import Compute
from pretrain.state import capture, restore
from pretrain.step import Setup, agree, train_step
from pretrain.testing import make_samples, split, tiny_pretrainer

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
KINDS = {
    "adamw": Optim(lr=0.02),
    "clipped adamw": Optim(lr=0.02, update_clip=0.3),
    "lamb": Optim(kind="lamb", lr=0.02),
    "lion": Optim(kind="lion", lr=0.002),
    "adafactor": Optim(kind="adafactor", lr=0.02, betas=(0.9, 0.999)),
    "clipped adafactor": Optim(kind="adafactor", lr=0.02, betas=(0.0, 0.95), update_clip=0.3),
    "muon": Optim(kind="muon", lr=0.02),
}
SHARDED = [name for name in KINDS if name != "muon"]
WAYS = [
    *[(name, "ddp", 1) for name in KINDS],
    *[(name, "ddp", 2) for name in ("adamw", "lamb", "adafactor")],
    *[(name, "fsdp", 2) for name in SHARDED],
    *[(name, "fsdp", 4) for name in ("lamb", "adafactor")],
]


class Trainer:
    """A tiny run in float32, of which Adafactor factors most matrices."""

    def __init__(self, ranks: Ranks, name: str, parallel: str) -> None:
        self.ranks, self.optim = ranks, KINDS[name]
        self.pretrainer = tiny_pretrainer(("itc", "lm"), ranks.group).float()
        spread = Spread(parallel=parallel)  # type: ignore[arg-type]
        wrapped = wrap(self.pretrainer, ranks, spread)
        self.setup = Setup(wrapped=wrapped, compute=Compute(device=ranks.device, bf16=False))
        self.optimizer = build_optimizer(self.pretrainer, self.optim, {"model.text.project.weight": 0.5})
        for group in self.optimizer.param_groups:
            if self.optim.kind == "adafactor":
                group["min_dim_size_to_factor"] = 5
        self.batches = split(make_samples(23), ranks, 1)

    def train(self, steps: Sequence[int]) -> list[str]:
        """The losses, and hashes of every tensor that this rank would save."""
        said: list[str] = []
        for step in steps:
            set_rate(self.optimizer, self.optim, step=step, steps=200)
            done = train_step(
                self.setup,
                self.batches,
                self.optimizer,
                counts=agree(self.setup, self.batches).counts,
                weights={"itc": 1.0, "lm": 1.0},
                largest_norm=1.0,
                key=(0, step),
            )
            said.append(float(done.values["loss"]).hex())
        return said + self.state()

    def state(self) -> list[str]:
        return sorted(
            f"{group} {name} {value.dtype} {tuple(value.shape)} {digest(value)}"
            for group, tensors in capture(self.pretrainer, self.optimizer).items()
            for name, value in tensors.items()
        )

    def save(self, folder: Path) -> None:
        beside = self.ranks.on_zero(lambda: checkpoint.begin(folder, 3))
        assert beside is not None
        named = capture(self.pretrainer, self.optimizer)
        staged = {group: stage(tensors, zero=self.ranks.zero) for group, tensors in named.items()}
        files = checkpoint.write_part(
            beside, staged, rank=self.ranks.rank, state={} if self.ranks.zero else None
        )
        parts = self.ranks.gather_objects(files)
        self.ranks.on_zero(
            lambda: checkpoint.commit(beside, {k: v for part in parts for k, v in part.items()})
        )

    def take_up(self, folder: Path) -> None:
        restore(checkpoint.Checkpoint(folder / "step-00000003", 3).tensors(), self.pretrainer, self.optimizer)


def digest(tensor: torch.Tensor) -> str:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return blake2b(whole.detach().reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


def straight_and_resumed(
    ranks: Ranks, *, name: str, parallel: str, folder: Path
) -> tuple[list[str], list[str]]:
    """Four steps, and four of which the last two were done by another that read the checkpoint."""
    trainer = Trainer(ranks, name, parallel)
    trainer.train(range(2))
    trainer.save(folder)
    saved = trainer.state()
    straight = trainer.train(range(2, 4))
    again = Trainer(ranks, name, parallel)
    again.take_up(folder)
    assert again.state() == saved
    return straight, again.train(range(2, 4))


@pytest.mark.parametrize(("name", "parallel", "world"), WAYS)
def test_a_run_that_was_killed_goes_on_with_the_same_bits(pool, tmp_path, name, parallel, world):
    """Weights, moments of any shape and type, and counts of steps, wherever an optimizer keeps them."""
    found = pool.run(straight_and_resumed, world, name=name, parallel=parallel, folder=tmp_path)
    for straight, resumed in found:
        assert resumed == straight
    keys = {line.split()[1].rpartition(".")[2] for line in found[0][0] if line.startswith("optimizer")}
    assert (
        keys
        == {
            "adamw": {"step", "exp_avg", "exp_avg_sq"},
            "clipped adamw": {"step", "exp_avg", "exp_avg_sq"},
            "lamb": {"step", "exp_avg", "exp_avg_sq"},
            "lion": {"exp_avg"},
            "adafactor": {"step", "exp_avg", "exp_avg_sq", "exp_avg_sq_r", "exp_avg_sq_c"},
            "clipped adafactor": {"step", "exp_avg_sq", "exp_avg_sq_r", "exp_avg_sq_c"},
            "muon": {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"},
        }[name]
    )


def save_on_ranks(ranks: Ranks, *, name: str, parallel: str, folder: Path) -> list[str]:
    trainer = Trainer(ranks, name, parallel)
    trainer.train(range(3))
    trainer.save(folder)
    return trainer.state()


def take_up_on_ranks(ranks: Ranks, *, name: str, parallel: str, folder: Path) -> list[str]:
    trainer = Trainer(ranks, name, parallel)
    trainer.take_up(folder)
    held = trainer.state()
    trainer.train([3])
    return held


@pytest.mark.parametrize("name", ["lamb", "adafactor"])
def test_moments_of_shards_are_taken_up_whole_and_back(pool, tmp_path, name):
    saved = pool.run(save_on_ranks, 2, name=name, parallel="fsdp", folder=tmp_path)[0]
    assert pool.run(take_up_on_ranks, 1, name=name, parallel="ddp", folder=tmp_path)[0] == saved
    assert pool.run(take_up_on_ranks, 4, name=name, parallel="fsdp", folder=tmp_path)[3] == saved


SHAPES = ((37, 33), (33, 70), (34, 35, 3, 3), (40,), (7,), (3, 40), (1,))


def apart(ranks: Ranks, *, name: str) -> float:
    """The largest difference of a weight after steps of an optimizer on whole tensors, and on shards."""
    random = torch.Generator().manual_seed(0)
    mesh = DeviceMesh.from_group(ranks.group, "cpu") if ranks.group else None

    def held(value: torch.Tensor, *, sharded: bool) -> torch.Tensor:
        whole = mesh is None or not sharded or value.numel() == 1
        return value.clone() if whole else distribute_tensor(value.clone(), mesh, [Shard(0)])

    values = [torch.randn(shape, generator=random) for shape in SHAPES]
    modules = [
        nn.ParameterList([nn.Parameter(held(value, sharded=sharded)) for value in values])
        for sharded in (False, True)
    ]
    optimizers = [build_optimizer(module, KINDS[name]) for module in modules]
    for step in range(3):
        gradients = [torch.randn(shape, generator=random) for shape in SHAPES]
        for module, optimizer, sharded in zip(modules, optimizers, (False, True), strict=True):
            set_rate(optimizer, KINDS[name], step=step, steps=9)
            for parameter, gradient in zip(module, gradients, strict=True):
                parameter.grad = held(gradient, sharded=sharded)
            optimizer.step()
    whole, shards = ([getattr(p, "full_tensor", lambda p=p: p)() for p in module] for module in modules)
    return max(float((a - b).abs().max()) for a, b in zip(whole, shards, strict=True))


@pytest.mark.parametrize("name", SHARDED)
def test_an_update_of_shards_is_that_of_the_whole(pool, name):
    """Also where it depends on the whole tensor: its norms, its means over rows and columns."""
    assert max(pool.run(apart, 4, name=name)) <= 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_what_it_will_keep_is_known_before(name):
    trainer = Trainer(ALONE, name, "ddp")
    for group in trainer.optimizer.param_groups:  # as they were built
        group.update({"min_dim_size_to_factor": 32} if "min_dim_size_to_factor" in group else {})
    before = bytes_kept(trainer.optimizer, trainer.optim.kind)
    trainer.train([0])
    states = trainer.optimizer.state
    kept = sum(v.nbytes for s in states.values() for k, v in s.items() if torch.is_tensor(v) and k != "step")
    used = {p for p in trainer.pretrainer.parameters() if p in states}
    for group in trainer.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in used]
    assert before - bytes_kept(trainer.optimizer, trainer.optim.kind) == kept
