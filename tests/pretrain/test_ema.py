"""The moving average of the weights is what its formula says, whole, in shards and after a restart."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pretrain import checkpoint
from pretrain.distributed import Ranks
from pretrain.ema import Ema
from pretrain.optim import Optim, build_optimizer, set_rate
from pretrain.parallel import Spread, wrap
from pretrain.pieces import stage
from pretrain.precision import Compute
from pretrain.state import capture, restore
from pretrain.step import Setup, agree, train_step
from pretrain.testing import make_samples, split, tiny_pretrainer

DECAY = 0.9
ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
OPTIM = Optim(lr=0.02, warmup=0, schedule="constant")


class Trainer:
    """A tiny run whose image tower does not train."""

    def __init__(self, ranks: Ranks, parallel: str) -> None:
        self.ranks = ranks
        self.pretrainer = tiny_pretrainer(("itc", "lm"), ranks.group).float()
        for parameter in self.pretrainer.model.image.parameters():
            parameter.requires_grad_(False)
        wrapped = wrap(self.pretrainer, ranks, Spread(parallel=parallel))  # type: ignore[arg-type]
        self.setup = Setup(wrapped=wrapped, compute=Compute(device=ranks.device, bf16=False))
        self.optimizer = build_optimizer(self.pretrainer, OPTIM)
        self.ema = Ema(self.pretrainer, DECAY)
        self.batches = split(make_samples(23), ranks, 1)

    def step(self, number: int, *, unfit: bool = False) -> None:
        set_rate(self.optimizer, OPTIM, step=number, steps=20)
        train_step(
            self.setup,
            self.batches,
            self.optimizer,
            counts=agree(self.setup, self.batches).counts,
            weights={"itc": 1.0, "lm": 1.0},
            largest_norm=1.0,
            key=(0, number),
            unfit=unfit,
            ema=self.ema,
        )

    def weights(self) -> dict[str, Tensor]:
        return {name: whole(p) for name, p in self.pretrainer.named_parameters() if p.requires_grad}

    def averages(self) -> dict[str, Tensor]:
        return {name: whole(each) for name, each in self.ema.averages.items()}

    def encode(self) -> list[list[float]]:
        with self.setup.wrapped.whole(), torch.no_grad():
            assert self.pretrainer.model.text is not None
            return self.pretrainer.model.text(self.batches[0].tokens, self.batches[0].text_length)[0].tolist()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def followed(ranks: Ranks, *, parallel: str) -> bool:
    """Every property that a run relies on, of one run."""
    trainer = Trainer(ranks, parallel)
    expected = trainer.weights()
    assert same(trainer.averages(), expected)
    assert not any(name.startswith("model.image") for name in expected)
    for number in range(4):
        before = trainer.averages()
        trainer.step(number, unfit=number == 2)
        if number == 2:
            assert same(trainer.averages(), before)
            continue
        now = trainer.weights()
        expected = {name: DECAY * expected[name] + (1 - DECAY) * now[name] for name in expected}
    for name, average in trainer.averages().items():
        assert torch.allclose(average, expected[name], rtol=0, atol=1e-6)
    kept, said = trainer.weights(), trainer.encode()
    with trainer.ema.swapped():
        assert same(trainer.weights(), trainer.averages())
        averaged = trainer.encode()
    assert averaged != said
    assert same(trainer.weights(), kept)
    assert trainer.encode() == said
    return True


@pytest.mark.parametrize(("parallel", "world"), [("ddp", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4)])
def test_it_follows_accepted_steps_and_can_stand_in_for_the_weights(pool, parallel, world):
    assert all(pool.run(followed, world, parallel=parallel))


def test_its_update_is_that_of_torch():
    module = nn.Linear(3, 2)
    theirs, ours = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.99)), Ema(module, 0.99)
    theirs.update_parameters(module)  # the first one copies
    for _ in range(5):
        with torch.no_grad():
            module.weight.normal_()
        theirs.update_parameters(module)
        ours.update()
    assert torch.equal(theirs.get_parameter("module.weight"), ours.averages["weight"])


def test_weights_of_few_bits_are_averaged_in_many():
    """In bf16 a decay of 0.999 would change nothing: 1.01 and 1 are one number apart."""
    module = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(module.weight, 1.0)
    ema = Ema(module, 0.999)
    nn.init.constant_(module.weight, 1.015625)
    for _ in range(100):
        ema.update()
    assert ema.averages["weight"].dtype == torch.float32
    assert ema.averages["weight"].item() == pytest.approx(1 + 0.015625 * (1 - 0.999**100), rel=1e-5)
    with ema.swapped():
        assert module.weight.dtype == torch.bfloat16
    assert module.weight.item() == 1.015625


def straight_and_resumed(ranks: Ranks, *, folder: Path, parallel: str) -> bool:
    trainer = Trainer(ranks, parallel)
    trainer.step(0)
    beside = ranks.on_zero(lambda: checkpoint.begin(folder, 1))
    assert beside is not None
    named = capture(trainer.pretrainer, trainer.optimizer, trainer.ema)
    staged = {group: stage(tensors, zero=ranks.zero) for group, tensors in named.items()}
    files = checkpoint.write_part(beside, staged, rank=ranks.rank, state={} if ranks.zero else None)
    parts = ranks.gather_objects(files)
    ranks.on_zero(lambda: checkpoint.commit(beside, {k: v for part in parts for k, v in part.items()}))
    trainer.step(1)
    again = Trainer(ranks, parallel)
    found = checkpoint.Checkpoint(folder / "step-00000001", 1).tensors()
    restore(found, again.pretrainer, again.optimizer, ema=again.ema)
    again.step(1)
    assert same(again.averages(), trainer.averages())
    # Of a checkpoint without averages, they begin with its weights; a run without them leaves them out.
    del found["ema"]
    restore(found, again.pretrainer, again.optimizer, ema=again.ema)
    assert same(again.averages(), again.weights())
    assert "ema" not in capture(again.pretrainer, again.optimizer)
    return True


@pytest.mark.parametrize(("parallel", "world"), [("ddp", 1), ("fsdp", 2)])
def test_it_goes_on_from_a_checkpoint_with_the_same_bits(pool, tmp_path, parallel, world):
    assert all(pool.run(straight_and_resumed, world, parallel=parallel, folder=tmp_path))
