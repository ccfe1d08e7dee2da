"""The gradient of a step is that of the whole global batch, on any number of ranks and micro-batches."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from objectives import OBJECTIVES
from pretrain.distributed import Ranks
from pretrain.parallel import wrap
from pretrain.precision import Compute
from pretrain.pretrainer import Pretrainer
from pretrain.step import Setup, agree, backward, train_step
from pretrain.testing import make_samples, split, tiny_pretrainer

ALONE = [(kind,) for kind in OBJECTIVES]
PAIRS = list(itertools.combinations(OBJECTIVES, 2))
SAMPLES = 41
"""More than the pieces of 8 micro-batches on 4 ranks."""


def gradient(
    ranks: Ranks, kinds: tuple[str, ...], micro_batches: int, dtype: torch.dtype = torch.float64
) -> tuple[list[float], dict[str, int]]:
    """The gradient of one step, flat, and how often each tower ran."""
    pretrainer = tiny_pretrainer(kinds, ranks.group).to(dtype)
    runs = {"image": 0, "text": 0, "captioner": 0, "fusion": 0}
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


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kinds", [*ALONE, *PAIRS], ids="+".join)
def test_the_gradient_is_that_of_the_whole_batch(pool, whole, kinds, world, micro_batches):
    results = pool.run(gradient, world, kinds=kinds, micro_batches=micro_batches)
    for found, _ in results:
        error = (exact(found) - whole[kinds]).norm() / whole[kinds].norm()
        assert error <= 1e-9
    assert whole[kinds].norm() > 1e-3


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kinds", [("itc", "itm", "lm"), ("siglip", "itm")], ids="+".join)
def test_so_it_is_in_float32(pool, kinds, world):
    alone = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
    expected = exact(gradient(alone, kinds, 1)[0])
    for found, _ in pool.run(gradient, world, kinds=kinds, micro_batches=4, dtype=torch.float32):
        assert (exact(found) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("kinds", [*ALONE, *PAIRS], ids="+".join)
def test_each_tower_runs_once_per_micro_batch_and_once_more_where_they_are_coupled(kinds, micro_batches):
    alone = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
    _, runs = gradient(alone, kinds, micro_batches)
    contrast = "itc" in kinds or "siglip" in kinds
    again = micro_batches if contrast and micro_batches > 1 else 0
    fused = micro_batches if "itm" in kinds else 0
    assert runs == {
        "image": micro_batches + again,
        # The tiny fusion tower runs the text tower.
        "text": (micro_batches + again if contrast else 0) + fused,
        "captioner": micro_batches if "lm" in kinds else 0,
        "fusion": fused,
    }


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


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_with_a_rounded_wire_says_what_it_costs(pool, world):
    for error, norm in pool.run(rounded, world):
        assert (error is None) == (world == 1), "one process sends nothing"
        assert error is None or 0 < error < 0.1
        assert norm > 0


def rounded(ranks: Ranks) -> tuple[float | None, float]:
    pretrainer = tiny_pretrainer(("itc",), ranks.group).float()
    setattr(pretrainer.objectives["itc"], "wire", "bf16")  # noqa: B010  (a setting, not a part)
    setup, batches = setup_of(pretrainer, ranks), split(make_samples(16), ranks, 2)
    optimizer = torch.optim.AdamW(pretrainer.parameters())
    counts = agree(setup, batches).counts
    done = train_step(
        setup, batches, optimizer, counts=counts, weights={"itc": 1.0}, largest_norm=1.0, key=(0, 0)
    )
    error = done.values.get("itc/wire_error")
    return None if error is None else float(error), float(done.norms.whole)
