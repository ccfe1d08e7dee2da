"""What travels between ranks: the gradients are those of one process, and the bytes are counted.

A ring of w ranks sends, from each: (w - 1) blocks of one rank to gather or scatter, 2 (w - 1) / w of the
whole to reduce on all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from datasets.batch import Batch
from objectives.base import IMAGE, TEXT, Objective, Widths
from objectives.gather import Rows, Wire, grid_of, sides
from objectives.itc import ITC
from objectives.siglip import SigLIP
from pretrain.distributed import Ranks
from pretrain.testing import make_samples, merge

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
WIDTHS = Widths(embed=16, image_tokens=1, text_tokens=1, vocabulary=1, temperature=True, contrast=False)
OBJECTIVES: dict[str, Callable[[Wire], Objective]] = {
    "itc": lambda wire: ITC(ITC.Config(wire=wire), WIDTHS),
    "smooth": lambda wire: ITC(ITC.Config(wire=wire, smoothing=0.1), WIDTHS),
    "siglip": lambda wire: SigLIP(SigLIP.Config(wire=wire), WIDTHS),
}


class Given:
    """Encodings that are simply there."""

    def __init__(self, ranks: Ranks, image: Tensor, text: Tensor) -> None:
        self.group = ranks.group
        self._given = {IMAGE: image, TEXT: text}
        self.logit_scale = torch.tensor([2.0], dtype=image.dtype, requires_grad=True)
        self.logit_bias = torch.tensor([-3.0], dtype=image.dtype, requires_grad=True)

    def __getitem__(self, wanted):
        return self._given[wanted]


def table(rows: int, seed: int, width: int = 16) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=random, dtype=torch.float64), dim=-1)


PARTS = {
    1: [[0, 1, 2, 3, 5, 4, 6, 7, 8]],
    2: [[0, 1, 2, 3], [5, 4, 6, 7, 8]],
    4: [[0, 1, 2, 3], [5], [4], [6, 7, 8]],
}
"""Samples of each rank. Of 4, one has an image without text and one a masked pair; 1 and 8 say the same."""


def gradients(ranks: Ranks, kind: str, wire: Any = "exact") -> tuple[Any, ...]:
    """Sums over ranks of value and metrics; gradients at our embeddings, and at what ranks share."""
    part = PARTS[ranks.world][ranks.rank]
    samples = make_samples(9)
    batch = merge([samples[place] for place in part])
    image = torch.cat([table(1, 2 * place) for place in part]).requires_grad_()
    text = torch.cat([table(len(samples[place].tokens), 2 * place + 1) for place in part]).requires_grad_()
    encodings: Any = Given(ranks, image, text)
    terms = OBJECTIVES[kind](wire)(encodings, batch)
    leaves = [image, text, encodings.logit_scale, *([encodings.logit_bias] if kind == "siglip" else [])]
    found = torch.autograd.grad(terms.total, leaves)
    sums = {"total": terms.total.detach(), **terms.metrics}
    return (
        {name: ranks.sum(value.double().sum()).item() for name, value in sums.items()},
        *(each.tolist() for each in found[:2]),
        [ranks.sum(each.clone()).tolist() for each in found[2:]],
    )


def joined(results: list[Any], side: int) -> Tensor:
    return torch.cat([torch.tensor(result[side], dtype=torch.float64).view(-1, 16) for result in results])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_grid_of_ranks_has_the_gradient_of_one(pool, kind, world):
    alone = [gradients(ALONE, kind)]
    results = pool.run(gradients, world, kind=kind)
    for found in results:
        assert found[0] == pytest.approx(alone[0][0], rel=1e-12)
        for shared, expected in zip(found[3], alone[0][3], strict=True):
            assert shared == pytest.approx(expected, rel=1e-9)
    for side in (1, 2):
        torch.testing.assert_close(joined(results, side), joined(alone, side), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_bfloat16_on_the_wire_is_near_and_says_how_near(pool, kind, world):
    alone = [gradients(ALONE, kind)]
    results = pool.run(gradients, world, kind=kind, wire="bf16")
    for side in (1, 2):
        error = (joined(results, side) - joined(alone, side)).norm() / joined(alone, side).norm()
        assert 1e-5 < error < 1e-2
    pairs = 6 + 1  # sample 3 has two captions; 4 is masked, 5 has none
    assert 1e-5 < results[0][0]["wire_error"] / pairs < 0.1
    assert "wire_error" not in alone[0][0]


@contextmanager
def counted() -> Iterator[list[float]]:
    """Bytes that a rank sends in each collective, in a ring of the collective's ranks."""
    sent: list[float] = []

    def size(values: Tensor | list[Tensor]) -> int:
        return sum(map(size, values)) if isinstance(values, list) else values.numel() * values.element_size()

    costs: dict[str, Callable[..., float]] = {
        "all_gather_into_tensor": lambda w, out, mine, **_: (w - 1) * size(mine),
        "all_gather": lambda w, out, mine, **_: (w - 1) * size(mine),
        "reduce_scatter_tensor": lambda w, mine, given, *_, **__: (w - 1) * size(mine),
        "all_to_all_single": lambda w, out, given, **_: (w - 1) / w * size(given),
        # gloo gives back what open_clip gathered by one scatter from each rank.
        "scatter": lambda w, out, given=None, *_, **__: (w - 1) * size(out) if given else 0,
        "all_reduce": lambda w, values, *_, **__: 2 * (w - 1) / w * size(values),
    }

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            sent.append(costs[name](dist.get_world_size(more.get("group")), *args, **more))
            return original(*args, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in costs:
            patch.setattr(dist, name, wrap(name, getattr(dist, name)))
        yield sent


ROWS, WIDTH = 64, 512


def sent_bytes(ranks: Ranks, system: str) -> tuple[float, list[list[float]]]:
    """By one rank for one step, in units of its images; and the gradient of the mean at its embeddings."""
    total = ROWS * ranks.world
    mine = slice(ROWS * ranks.rank, ROWS * (ranks.rank + 1))
    image, text = (table(total, seed, WIDTH)[mine].float().requires_grad_() for seed in (0, 1))
    encodings: Any = Given(ranks, image, text)
    grid_of(ranks.group)  # making groups is no part of a step
    with counted() as sent:
        if system == "open_clip":
            from open_clip.loss import ClipLoss

            loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=ranks.rank, world_size=ranks.world)
            # Every rank has a mean over its own rows: the mean over ranks is that over all.
            total_loss = loss(image, text, encodings.logit_scale.exp()) / ranks.world
        else:
            batch = merge([plain(place) for place in range(ROWS * ranks.rank, ROWS * (ranks.rank + 1))])
            wire: Wire = "bf16" if system == "itc, bf16" else "exact"
            objectives = [OBJECTIVES[kind](wire) for kind in system.partition(",")[0].split("+")]
            total_loss = torch.stack([each(encodings, batch).total for each in objectives]).sum() / total
        found = torch.autograd.grad(total_loss, [image, text])
    return sum(sent) / (ROWS * WIDTH * 4), [each.tolist() for each in found]


def plain(place: int) -> Batch:
    """One image with one caption of its own."""
    return replace(make_samples(1)[0], text_id=torch.tensor([place]))


def test_ranks_send_a_third_of_what_open_clip_sends_for_equal_gradients(pool):
    theirs = pool.run(sent_bytes, 4, system="open_clip")
    ours = pool.run(sent_bytes, 4, system="itc")
    assert {units for units, _ in theirs} == {12.0}
    for (units, found), (_, expected) in zip(ours, theirs, strict=True):
        assert 4 < units <= 4.2  # 2 x 2 ranks: a block of each side, there and back, and some vectors
        for mine, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(reference), rtol=1e-4, atol=1e-8)
    assert max(units for units, _ in pool.run(sent_bytes, 4, system="itc, bf16")) <= 2.2


@pytest.mark.parametrize(("world", "least", "most"), [(2, 2, 2.1), (4, 4, 4.2)])
def test_a_second_objective_gathers_nothing_again(pool, world, least, most):
    alone, both = (pool.run(sent_bytes, world, system=system)[0][0] for system in ("itc", "itc+siglip"))
    assert least < alone <= most
    # The gradients of the second go back; nothing comes but what two rows of numbers need.
    assert both - alone <= least / 2 + 0.1


def test_a_grid_is_as_square_as_the_number_of_ranks_allows():
    assert [sides(world) for world in (1, 2, 3, 4, 6, 7, 8, 64, 96)] == [
        (1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (1, 7), (2, 4), (8, 8), (8, 12),
    ]  # fmt: skip
    rows, columns = sides(8)
    assert 2 * (rows + columns - 2) == 8  # open_clip: 4 (W - 1) = 28


def grids(ranks: Ranks) -> tuple[Any, ...]:
    grid = grid_of(ranks.group)
    assert grid_of(ranks.group) == grid
    every = Rows((1,) * ranks.world, ranks.rank, ranks.group)
    mine = torch.tensor([float(ranks.rank)])
    return grid.rows_down(every).collect(mine).tolist(), grid.rows_across(every).collect(mine).tolist()


def test_ranks_of_a_group_gather_down_and_across(pool):
    assert pool.run(grids, 4) == [([0, 2], [0, 1]), ([1, 3], [0, 1]), ([0, 2], [2, 3]), ([1, 3], [2, 3])]
    assert pool.run(grids, 2) == [([0], [0, 1]), ([1], [0, 1])]
    assert pool.run(grids, 1) == [([0], [0])]
