"""With dropout of words and patches on, a step has the gradient of its pieces under the same masks.

The reference is one process that encodes the piece of every rank and micro-batch with that piece's own key,
joins them, and calls each objective once: plain autograd, no circles, no second pass.
"""

import pytest
import torch
from torch import Tensor, nn

from objectives.base import Encodings
from pretrain.distributed import Ranks
from pretrain.encodings import ModelEncodings
from pretrain.parallel import wrap
from pretrain.precision import Compute
from pretrain.pretrainer import join
from pretrain.step import Setup, agree, backward
from pretrain.testing import make_samples, split, tiny_pretrainer

CPU = torch.device("cpu")
MIXES = [("itc", "lm"), ("itm", "lm"), ("siglip", "itm"), ("itm", "itc", "lm")]
DROPOUT, KEY = 0.4, (3, 7)


def flat(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(
        p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()
    )


def gradient(ranks: Ranks, kinds: tuple[str, ...], micro_batches: int) -> list[float]:
    pretrainer = tiny_pretrainer(kinds, ranks.group, dropout=DROPOUT)
    setup = Setup(wrapped=wrap(pretrainer, ranks), compute=Compute(device=ranks.device, bf16=False))
    batches = split(make_samples(41), ranks, micro_batches)
    divided = setup.wrapped.divided
    factors = {kind: divided / count for kind, count in agree(setup, batches).counts.items()}
    backward(setup, batches, factors, key=KEY)
    return flat(pretrainer).tolist()


def reference(kinds: tuple[str, ...], world: int, micro_batches: int) -> Tensor:
    pretrainer = tiny_pretrainer(kinds, dropout=DROPOUT)
    batches, pieces = [], []
    for rank in range(world):
        ranks = Ranks(rank=rank, world=world, device=CPU, group=None)
        for place, batch in enumerate(split(make_samples(41), ranks, micro_batches)):
            batches.append(batch)
            pieces.append(ModelEncodings(pretrainer.model, batch, group=None, key=KEY, piece=(rank, place)))
    joined = join(batches)
    given = {wanted: torch.cat([piece[wanted] for piece in pieces]) for wanted in pretrainer.coupled(kinds)}
    together: Encodings = ModelEncodings(pretrainer.model, joined, group=None, key=KEY, given=given)
    loss = torch.zeros((), dtype=torch.float64)
    for kind in kinds:
        objective = pretrainer.objectives[kind]
        if kind in ("itc", "siglip"):
            total = objective(together, joined).total
        elif kind == "lm":
            total = sum(objective(*each).total for each in zip(pieces, batches, strict=True))
        else:
            with torch.no_grad():
                drawn, first = objective.draw(together, joined), 0
            total = 0
            for piece, batch in zip(pieces, batches, strict=True):
                last = first + len(batch.images)
                total = total + objective(piece, batch, drawn.of_images(first, last)).total
                first = last
        loss = loss + total / objective.denominator(joined)
    loss.backward()
    return flat(pretrainer)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kinds", MIXES, ids="+".join)
def test_the_gradient_is_that_of_the_pieces_together(pool, kinds, world, micro_batches):
    expected = reference(kinds, world, micro_batches)
    for found in pool.run(gradient, world, kinds=kinds, micro_batches=micro_batches):
        assert (torch.tensor(found, dtype=torch.float64) - expected).norm() <= 1e-9 * expected.norm()


def test_dropout_makes_a_difference_and_so_does_the_piece():
    whole, halves = reference(("itm", "itc"), 1, 1), reference(("itm", "itc"), 1, 2)
    assert (whole - halves).norm() > 1e-3 * whole.norm()
