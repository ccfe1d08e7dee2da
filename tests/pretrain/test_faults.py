"""A step that is not finite on one rank is skipped by all, and nothing of it stays, to the bit."""

from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from datasets.batch import Batch
from objectives.base import IMAGE, TEXT, Encodings, Objective, Terms
from pretrain.distributed import Ranks
from pretrain.faults import is_fit
from pretrain.optim import Optim, build_optimizer, set_rate
from pretrain.parallel import Spread, wrap
from pretrain.precision import Compute
from pretrain.pretrainer import Pretrainer
from pretrain.state import capture
from pretrain.step import Setup, StepReport, agree, train_step
from pretrain.suspects import find_suspects
from pretrain.testing import make_samples, split, tiny_pretrainer

SAMPLES = 23
CHOSEN = 16
"""The sample that is spoiled. It has one text, and is on the last but one of four ranks."""
KINDS = ("itc", "lm")
ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
WAYS = (("adamw", 1, "ddp"), ("adamw", 2, "ddp"), ("muon", 1, "ddp"), ("adamw", 2, "fsdp"))
"""Optimizer, micro-batches and how it is spread."""
PLACES = [(world, way) for world in (1, 2, 4) for way in WAYS if world > 1 or way[2] == "ddp"]


class Remembering(Objective):
    """Remembers as MoCo does: a copy of the image head that follows it, and a queue of what was seen."""

    needs = frozenset({"image", "text"})
    passes = (IMAGE, TEXT)

    def __init__(self, head: Tensor) -> None:
        super().__init__()
        self._head = (head,)
        self.slow: Tensor
        self.queue: Tensor
        self.register_buffer("slow", head.detach().clone())
        self.register_buffer("queue", torch.eye(4, head.shape[0], dtype=head.dtype))
        self._seen: list[Tensor] = []

    def denominator(self, batch: Batch) -> Tensor:
        """Pairs."""
        return batch.pair_valid.sum()

    def forward(self, encodings: Encodings, batch: Batch) -> Terms:
        """Keeps what it sees, also of a step that will be skipped."""
        own = batch.pair_valid
        texts, images = encodings[TEXT][own], encodings[IMAGE][batch.image_index[own]]
        self._seen.append((images @ self.slow).detach()[:, : self.queue.shape[1]])
        return Terms((texts @ self.queue.T).square().sum() + (images - texts).square().sum(), {})

    def before(self, step: int) -> None:
        """Forget what a skipped step has left."""
        self._seen.clear()

    def commit(self) -> None:
        """Follow, and take in."""
        self.slow.lerp_(self._head[0].detach(), 0.25)
        self.queue.copy_(torch.cat([*self._seen, self.queue])[:4, : self.queue.shape[1]])


class Spoiler(NamedTuple):
    """A way to spoil a step on one rank."""

    spoil: Callable[[Pretrainer, list[Batch], Ranks, float], tuple[list[Batch], list[Any]]]
    kind: str
    said: str
    reason: str
    """What is said of the sample that is named; empty where none is."""


def in_tower(pretrainer: Pretrainer, batches: list[Batch], ranks: Ranks, value: float):
    """One image comes out of the tower with one number that is none."""
    target = make_samples(SAMPLES)[CHOSEN].images[0]

    def hook(module: Any, given: tuple[Tensor], said: Any) -> Any:
        its = (given[0] == target).flatten(1).all(1)
        return said._replace(pooled=said.pooled.masked_fill(its[:, None], value))

    return batches, [pretrainer.model.image.register_forward_hook(hook)]


def in_loss(pretrainer: Pretrainer, batches: list[Batch], ranks: Ranks, value: float):
    """One text has a loss that is none."""
    target = make_samples(SAMPLES)[CHOSEN].text_id[0]

    def hook(module: Any, given: tuple[Encodings, Batch], said: Terms) -> Terms:
        there = bool((given[1].text_id == target).any())
        return Terms(said.total + value, said.metrics) if there else said

    return batches, [pretrainer.objectives["lm"].register_forward_hook(hook)]


def in_gradient(pretrainer: Pretrainer, batches: list[Batch], ranks: Ranks, value: float):
    """One number of a gradient is none, on the last rank; every loss is one."""

    def spoil(gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        spoiled.view(-1)[0] = value
        return spoiled

    def hook(module: Any, given: tuple[Tensor], said: Any) -> None:
        if ranks.rank == ranks.world - 1 and said.pooled.requires_grad:
            said.pooled.register_hook(spoil)

    return batches, [pretrainer.model.image.register_forward_hook(hook)]


def in_input(pretrainer: Pretrainer, batches: list[Batch], ranks: Ranks, value: float):
    """One box has a coordinate that is none; no objective here reads it."""
    target = make_samples(SAMPLES)[CHOSEN].text_id[0]
    spoiled = [replace(b, boxes=torch.where((b.text_id == target)[:, None], value, b.boxes)) for b in batches]
    return spoiled, []


SPOILERS = {
    "tower": Spoiler(in_tower, "loss", "the loss of itc", "image encoding"),
    "loss": Spoiler(in_loss, "loss", "the loss of lm is", "loss of lm"),
    "gradient": Spoiler(in_gradient, "gradient", "the gradient of image is", ""),
    "input": Spoiler(in_input, "input", "its input", "boxes"),
}


class Trainer:
    """A tiny run of optimizer steps."""

    def __init__(self, ranks: Ranks, optimizer: str, micro_batches: int, parallel: str) -> None:
        self.ranks = ranks
        self.pretrainer = tiny_pretrainer(KINDS, ranks.group, dropout=0.1)
        remembering = Remembering(self.pretrainer.get_parameter("model.image.project.weight"))
        self.pretrainer.objectives["remembering"] = remembering  # type: ignore[index]
        self.optim = Optim(kind=optimizer, lr=0.05, warmup=0)  # type: ignore[arg-type]
        compute = Compute(device=ranks.device, bf16=False)
        spread = Spread(parallel=parallel)  # type: ignore[arg-type]
        self.setup = Setup(wrapped=wrap(self.pretrainer, ranks, spread), compute=compute)
        self.optimizer = build_optimizer(self.pretrainer, self.optim)
        self.batches = split(make_samples(SAMPLES), ranks, micro_batches)

    def step(self, number: int, batches: list[Batch]) -> StepReport:
        set_rate(self.optimizer, self.optim, step=number, steps=10)
        agreed = agree(self.setup, batches, asking={"unfit": not all(map(is_fit, batches))})
        return train_step(
            self.setup,
            batches,
            self.optimizer,
            counts=agreed.counts,
            weights=dict.fromkeys(self.pretrainer.objectives, 1.0),
            largest_norm=1.0,
            key=(0, number),
            unfit=agreed.sums["unfit"] > 0,
        )

    def state(self) -> list[str]:
        """A hash of every tensor that a checkpoint holds, as this rank holds it."""
        held = capture(self.pretrainer, self.optimizer)
        return [
            f"{group} {name} {blake2b(own(tensor).numpy().tobytes(), digest_size=8).hexdigest()}"
            for group, tensors in held.items()
            for name, tensor in tensors.items()
        ]


def own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained(
    ranks: Ranks, *, way: tuple[str, int, str] = WAYS[0], spoiled: str = "", value: float = 0.0
) -> tuple[list[str], list[tuple[str, str, list[tuple[int, str, str]]]]]:
    """The state after two good steps, with a spoiled one between them or none; what was said of that."""
    trainer, said = Trainer(ranks, *way), []
    assert trainer.step(0, trainer.batches).fault is None
    if spoiled:
        before = trainer.state()
        batches, hooks = SPOILERS[spoiled].spoil(trainer.pretrainer, trainer.batches, ranks, value)
        fault = trainer.step(1, batches).fault
        assert fault is not None
        suspects = find_suspects(trainer.setup, batches, fault, key=(0, 1))
        for hook in hooks:
            hook.remove()
        assert trainer.state() == before
        said.append((fault.kind, str(fault), [(one.rank, one.key, one.reason) for one in suspects]))
    assert trainer.step(2, trainer.batches).fault is None
    return trainer.state(), said


@pytest.fixture(scope="module")
def good(pool) -> dict[Any, list[list[str]]]:
    """The states of every rank after two good steps."""
    return {(world, way): [state for state, _ in pool.run(trained, world, way=way)] for world, way in PLACES}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("spoiled", SPOILERS)
def test_one_bad_batch_is_one_step_that_is_skipped_on_every_rank(pool, good, spoiled, world, value):
    """[good, bad, good] is [good, good], to the bit: weights, moments, momentum copies and queues."""
    check(pool, good, spoiled, world, value, WAYS[0])


@pytest.mark.parametrize(("world", "way"), [each for each in PLACES if each[1] != WAYS[0] and each[0] < 4])
@pytest.mark.parametrize("spoiled", SPOILERS)
def test_so_it_is_with_micro_batches_another_optimizer_and_shards(pool, good, spoiled, world, way):
    check(pool, good, spoiled, world, float("nan"), way)


def check(pool, good, spoiled: str, world: int, value: float, way: tuple[str, int, str]) -> None:
    results = pool.run(trained, world, way=way, spoiled=spoiled, value=value)
    assert [state for state, _ in results] == good[world, way]
    first, *others = [said for _, said in results]
    assert all(said == first for said in others)
    ((kind, sentence, suspects),) = first
    spoiler = SPOILERS[spoiled]
    assert kind == spoiler.kind
    assert spoiler.said in sentence
    if spoiler.reason:
        ((rank, key, reason),) = suspects
        assert rank == {1: 0, 2: 1, 4: 2}[world]
        assert (key, reason) == (f"sample/{CHOSEN}", spoiler.reason)
    else:
        assert len(suspects) == SAMPLES
        assert {reason for *_, reason in suspects} == {""}


def test_the_good_steps_have_changed_everything(pool, good):
    """Else equality would prove nothing."""
    start, after = set(Trainer(ALONE, *WAYS[0]).state()), set(good[1, WAYS[0]][0])
    changed = {line.split()[1] for line in after - start}
    assert {"objectives.remembering.slow", "objectives.remembering.queue", "model.logit_scale"} <= changed
    assert len(changed) > 40


def test_what_is_only_watched_may_be_no_number():
    trainer = Trainer(ALONE, *WAYS[0])
    hook = trainer.pretrainer.objectives["itc"].register_forward_hook(
        lambda module, given, said: Terms(said.total, {"accuracy": torch.tensor(float("nan"))})
    )
    done = trainer.step(0, trainer.batches)
    hook.remove()
    assert done.values["itc/accuracy"].isnan()
    assert done.fault is None
