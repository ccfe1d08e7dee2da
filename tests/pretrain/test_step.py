"""The gradient of a step is that of the whole global batch, on any number of ranks and micro-batches."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from objectives import OBJECTIVES
from pretrain.distributed import Ranks
from pretrain.encodings import ModelEncodings
from pretrain.parallel import wrap
from pretrain.precision import Compute
from pretrain.pretrainer import Pretrainer, join
from pretrain.step import Setup, agree, backward
from pretrain.testing import make_samples, split, tiny_pretrainer

ALONE = [(kind,) for kind in OBJECTIVES]
PAIRS = list(itertools.combinations(OBJECTIVES, 2))
SAMPLES = 23


def gradient(
    ranks: Ranks, kinds: tuple[str, ...], micro_batches: int, dropout: float = 0.0
) -> tuple[list[float], dict[str, int]]:
    """The gradient of one step, flat, and how often each tower ran."""
    pretrainer = tiny_pretrainer(kinds, ranks.group, dropout=dropout)
    runs = {"image": 0, "text": 0, "captioner": 0}
    for name in runs:
        tower = getattr(pretrainer.model, name)
        tower.register_forward_hook(lambda *_, name=name: runs.__setitem__(name, runs[name] + 1))
    setup = setup_of(pretrainer, ranks)
    batches = split(make_samples(SAMPLES), ranks, micro_batches)
    weights = {kind: 1.0 + place for place, kind in enumerate(kinds)}
    counts = agree(setup, batches).counts
    factors = {kind: weights[kind] * setup.wrapped.divided / count for kind, count in counts.items()}
    backward(setup, batches, factors, key=(0, 0))
    return flat(pretrainer).tolist(), runs


def setup_of(pretrainer: Pretrainer, ranks: Ranks) -> Setup:
    return Setup(wrapped=wrap(pretrainer, ranks), compute=Compute(device=ranks.device, bf16=False))


def flat(module: nn.Module) -> Tensor:
    """All gradients as one vector."""
    return nn.utils.parameters_to_vector(
        p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()
    )


def exact(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.fixture(scope="module")
def whole() -> dict[tuple[str, ...], torch.Tensor]:
    alone = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
    return {kinds: exact(gradient(alone, kinds, 1)[0]) for kinds in [*ALONE, *PAIRS]}


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kinds", [*ALONE, *PAIRS], ids="+".join)
def test_the_gradient_is_that_of_the_whole_batch(pool, whole, kinds, world, micro_batches):
    results = pool.run(gradient, world, kinds=kinds, micro_batches=micro_batches)
    for found, _ in results:
        error = (exact(found) - whole[kinds]).norm() / whole[kinds].norm()
        assert error <= 1e-9
    assert whole[kinds].norm() > 1e-3


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("kinds", [*ALONE, *PAIRS], ids="+".join)
def test_each_tower_runs_once_per_micro_batch_and_once_more_where_they_are_coupled(kinds, micro_batches):
    alone = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
    _, runs = gradient(alone, kinds, micro_batches)
    contrast = "itc" in kinds or "siglip" in kinds
    again = micro_batches if contrast and micro_batches > 1 else 0
    assert runs == {
        "image": micro_batches + again,
        "text": micro_batches + again if contrast else 0,
        "captioner": micro_batches if "lm" in kinds else 0,
    }


def test_the_second_pass_repeats_the_first_with_dropout_on():
    """With dropout, a coupled step in two passes has the gradient of a one-pass step with the same masks."""
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
    two_pass, _ = gradient(ranks, ("itc",), 3, dropout=0.5)

    pretrainer = tiny_pretrainer(("itc",), dropout=0.5)
    batches = split(make_samples(SAMPLES), ranks, 3)
    itc = pretrainer.objectives["itc"]
    pieces = [
        ModelEncodings(pretrainer.model, batch, group=None, key=(0, 0), piece=(0, place))
        for place, batch in enumerate(batches)
    ]
    given = {wanted: torch.cat([piece[wanted] for piece in pieces]) for wanted in itc.coupled}
    joined = join(batches)
    together = ModelEncodings(pretrainer.model, joined, group=None, key=(0, 0), given=given)
    (itc(together, joined).total / itc.denominator(joined)).backward()
    one_pass = flat(pretrainer)
    assert (exact(two_pass) - one_pass).norm() <= 1e-9 * one_pass.norm()


def test_a_flag_on_one_rank_is_seen_by_all_and_masked_samples_are_added_up(pool):
    assert pool.run(flagged, 4) == [(True, 6)] * 4


def flagged(ranks: Ranks) -> tuple[bool, int]:
    batches = split(make_samples(8), ranks, 1)
    pretrainer = tiny_pretrainer(("lm",), ranks.group)
    asking = {"stop": float(ranks.rank == 2), "masked": ranks.rank}
    agreed = agree(setup_of(pretrainer, ranks), batches, asking=asking)
    return bool(agreed.sums["stop"]), int(agreed.sums["masked"])


def test_a_step_keeps_to_its_device():
    """The meta device stands for a GPU: an operation that mixes it with host memory fails."""
    meta = torch.device("meta")
    ranks = Ranks(rank=0, world=1, device=meta, group=None)
    pretrainer = tiny_pretrainer(("itc", "lm")).to(meta)
    batches = [batch.to(meta) for batch in split(make_samples(8), ranks, 1)]
    agreed = agree(setup_of(pretrainer, ranks), batches)
    assert {count.device for count in agreed.counts.values()} == {meta}


def test_a_masked_slot_changes_nothing_but_itself():
    """The step with masked slots is the step without those samples."""
    alone = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
    samples = make_samples(SAMPLES)

    def grads(chosen) -> torch.Tensor:
        pretrainer = tiny_pretrainer(("itc", "lm"))
        batches = split(chosen, alone, 1)
        setup = setup_of(pretrainer, alone)
        factors = {kind: 1.0 / count for kind, count in agree(setup, batches).counts.items()}
        backward(setup, batches, factors, key=(0, 0))
        return flat(pretrainer)

    masked, without = grads(samples), grads([s for s in samples if bool(s.image_valid[0])])
    assert len([s for s in samples if not s.image_valid[0]]) >= 3
    assert (masked - without).norm() <= 1e-12 * without.norm()
