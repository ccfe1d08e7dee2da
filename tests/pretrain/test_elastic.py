"""Losses, gradients and weights have the same bits on 1, 2 and 4 ranks."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from datasets.batch import Batch
from datasets.errors import UserError
from objectives import OBJECTIVES
from pretrain.cli import parse
from pretrain.coupled import Pool
from pretrain.distributed import Ranks
from pretrain.elastic import Elastic, check_lanes, check_ranks
from pretrain.parallel import wrap
from pretrain.precision import Compute
from pretrain.step import Setup, agree, train_step
from pretrain.testing import make_samples, split, tiny_pretrainer

LANES = 8
EVERY = tuple(OBJECTIVES)


def lanes_of(source: str, seed: int, ranks: Ranks) -> list[Batch]:
    pieces = split(make_samples(40, seed=seed), ranks, LANES // ranks.world)
    return [replace(piece, source=source) for piece in pieces]


def trained(
    ranks: Ranks,
    kinds: Sequence[str],
    whose: Pool = "source",
    elastic: bool = True,
    dropout: float = 0.3,
    precision: torch.dtype = torch.float32,
) -> tuple[list[dict[str, float]], list[float]]:
    """What was reported of five steps of two sources, and the weights after them."""
    feeds = {"one": kinds, "two": kinds}
    pretrainer = tiny_pretrainer(kinds, ranks.group, dropout=dropout, feeds=feeds).to(precision)
    wrapped = Elastic(pretrainer, ranks, lanes=LANES) if elastic else wrap(pretrainer, ranks)
    setup = Setup(wrapped=wrapped, compute=Compute(device=ranks.device, bf16=False), pool=whose)
    optimizer = torch.optim.AdamW(pretrainer.parameters(), lr=0.02)
    said = []
    for step in range(5):
        batches = lanes_of("one", 2 * step, ranks)
        if step % 3:
            batches += lanes_of("two", 2 * step + 1, ranks)
        done = train_step(
            setup,
            batches,
            optimizer,
            counts=agree(setup, batches).counts,
            weights={kind: 1.0 + place for place, kind in enumerate(kinds)},
            largest_norm=1.0,
            key=(0, step),
        )
        said.append({**{at: float(v) for at, v in done.values.items()}, "norm": float(done.norms.whole)})
    return said, nn.utils.parameters_to_vector(pretrainer.parameters()).tolist()


def check_bits(pool, **arguments) -> tuple[list[dict[str, float]], list[float]]:
    (alone,) = pool.run(trained, 1, **arguments)
    for world in (2, 4):
        for found in pool.run(trained, world, **arguments):
            assert found == alone
    return alone


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_bit_is_the_same_on_any_number_of_ranks(pool, kind):
    check_bits(pool, kinds=(kind,))


@pytest.mark.parametrize("whose", ["source", "all"])
def test_so_it_is_of_all_objectives_together(pool, whose):
    said, _ = check_bits(pool, kinds=EVERY, whose=whose)
    assert {f"loss/{kind}" for kind in EVERY} <= said[0].keys()


def test_without_lanes_the_bits_differ(pool):
    """What the promise is worth: the same steps under DDP."""
    (alone,) = pool.run(trained, 1, kinds=("itc", "lm"), elastic=False)
    assert pool.run(trained, 4, kinds=("itc", "lm"), elastic=False)[0] != alone


@pytest.mark.parametrize("whose", ["source", "all"])
def test_it_trains_as_plain_steps_do(whose):
    """Without dropout and in float64, the weights are those of steps without lanes."""
    alone = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
    exact = {"kinds": EVERY, "whose": whose, "dropout": 0.0, "precision": torch.float64}
    reports, weights = trained(alone, **exact)
    plain, expected = trained(alone, **exact, elastic=False)
    for one, other in zip(reports, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    assert weights == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("given", "said"),
    [((128, 1, 6), "power of two"), ((100, 1, 8), "multiple of the lanes"), ((128, 2, 8), "micro-batches")],
)
def test_what_cannot_be_cut_into_lanes_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        check_lanes(*given)
    check_lanes(128, 1, 8)
    with pytest.raises(UserError, match="number of ranks that divides them"):
        check_ranks(8, 3)


@pytest.mark.parametrize(
    "flags", ["--parallel fsdp", "--compile", "--precision.parameters bf16", "--objectives.itc.wire bf16"]
)
def test_what_would_break_the_promise_is_refused(flags):
    with pytest.raises(UserError, match="--deterministic elastic"):
        parse(["--objectives", "itc", "--deterministic", "elastic", *flags.split()])


def test_ranks_that_drew_other_weights_begin_with_those_of_rank_zero(pool):
    first, second = pool.run(begun_apart, 2)
    assert first == second


def begun_apart(ranks: Ranks) -> list[float]:
    pretrainer = tiny_pretrainer(("itc",), ranks.group)
    with torch.no_grad():
        for parameter in pretrainer.parameters():
            parameter.add_(ranks.rank)
    Elastic(pretrainer, ranks, lanes=LANES)
    return nn.utils.parameters_to_vector(pretrainer.parameters()).tolist()
