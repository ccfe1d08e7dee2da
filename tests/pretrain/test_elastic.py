"""Losses, gradients and weights have the same bits on 1, 2 and 4 ranks."""

import pytest
import torch
from torch import nn

from datasets.errors import UserError
from objectives import OBJECTIVES
from pretrain.coupled import Pool
from pretrain.distributed import Ranks
from pretrain.elastic import Elastic, check_lanes
from pretrain.parallel import wrap
from pretrain.precision import Compute
from pretrain.step import Setup, agree, train_step
from pretrain.testing import make_samples, merge, split, tiny_pretrainer

LANES = 8
EVERY = tuple(OBJECTIVES)
from dataclasses import replace


def lanes_of(source: str, seed: int, ranks: Ranks) -> list:
    pieces = split(make_samples(40, seed=seed), ranks, LANES // ranks.world)
    return [replace(piece, source=source) for piece in pieces]


def trained(ranks: Ranks, kinds: tuple[str, ...], pool: Pool, elastic: bool = True) -> tuple[list, list]:
    """Bits of what was reported in eight steps of two sources, and of the weights after them."""
    feeds = {"one": kinds, "two": kinds}
    pretrainer = tiny_pretrainer(kinds, ranks.group, dropout=0.3, feeds=feeds).float()
    wrapped = Elastic(pretrainer, ranks, lanes=LANES) if elastic else wrap(pretrainer, ranks)
    setup = Setup(wrapped=wrapped, compute=Compute(device=ranks.device, bf16=False), pool=pool)
    optimizer = torch.optim.AdamW(pretrainer.parameters(), lr=0.02)
    said = []
    for step in range(8):
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


@pytest.mark.parametrize("pool_of", ["source", "all"])
@pytest.mark.parametrize("kinds", [*((kind,) for kind in OBJECTIVES), EVERY], ids="+".join)
def test_every_bit_is_the_same_on_any_number_of_ranks(pool, kinds, pool_of):
    alone, *_ = pool.run(trained, 1, kinds=kinds, pool=pool_of)
    for world in (2, 4):
        for found in pool.run(trained, world, kinds=kinds, pool=pool_of):
            assert found == alone
