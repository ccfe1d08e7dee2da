"""A step of several sources: who sees what, who is contrasted with whom, and one mean over all of them."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from datasets.batch import Batch
from pretrain.coupled import Pool
from pretrain.distributed import Ranks
from pretrain.parallel import wrap
from pretrain.precision import Compute
from pretrain.step import Setup, agree, backward, train_step
from pretrain.testing import make_samples, merge, split, tiny_pretrainer

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
COMPUTE = Compute(device=ALONE.device, bf16=False)
KEY = (0, 0)
MIXES = [("itc", "lm"), ("siglip", "lm"), ("itc", "siglip", "lm"), ("itm", "lm"), ("itm", "itc", "lm")]


def samples_of(source: str) -> list[Batch]:
    """Pairs of two sources, which share some captions, and texts without images."""
    if source == "pairs":
        return make_samples(11)
    if source == "more":
        return make_samples(9, seed=1)
    assert source == "books"
    return [
        replace(
            sample,
            images=sample.images[:0],
            image_valid=sample.image_valid[:0],
            image_index=torch.full_like(sample.image_index, -1),
        )
        for sample in make_samples(10, seed=2)
    ]


def feeding(kinds: Sequence[str]) -> dict[str, Sequence[str]]:
    return {"pairs": kinds, "more": kinds, "books": ("lm",)}


def pieces(sources: Sequence[str], ranks: Ranks, micro_batches: int) -> list[Batch]:
    return [
        replace(piece, source=source)
        for source in sources
        for piece in split(samples_of(source), ranks, micro_batches)
    ]


def flat(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(
        p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()
    )


def weights_of(kinds: Sequence[str]) -> dict[str, float]:
    return {kind: 1.0 + place for place, kind in enumerate(kinds)}


def gradient(
    ranks: Ranks,
    kinds: Sequence[str],
    micro_batches: int = 1,
    pool: Pool = "source",
    sources: Sequence[str] = ("pairs", "more", "books"),
    feeds: dict[str, Sequence[str]] | None = None,
) -> tuple[list[float], dict[str, int]]:
    """The gradient of one step, flat, and how often each tower ran."""
    pretrainer = tiny_pretrainer(kinds, ranks.group, feeds=feeds or feeding(kinds))
    runs = {"image": 0, "text": 0, "captioner": 0}
    for name in runs:
        tower = getattr(pretrainer.model, name)
        tower.register_forward_hook(lambda *_, name=name: runs.__setitem__(name, runs[name] + 1))
    setup = Setup(wrapped=wrap(pretrainer, ranks), compute=COMPUTE, pool=pool)
    batches = pieces(sources, ranks, micro_batches)
    weights, counts = weights_of(kinds), agree(setup, batches).counts
    factors = {kind: weights[kind] * setup.wrapped.divided / count for kind, count in counts.items()}
    backward(setup, batches, factors, key=KEY)
    return flat(pretrainer).tolist(), runs


def reference(kinds: Sequence[str], circles: dict[str, list[list[str]]]) -> Tensor:
    """The gradient by the formula: sums over whole circles of sources, divided by the count over all."""
    pretrainer = tiny_pretrainer(kinds)
    loss = torch.zeros((), dtype=torch.float64)
    for kind, weight in weights_of(kinds).items():
        objective = pretrainer.objectives[kind]
        batches = [merge([s for name in circle for s in samples_of(name)]) for circle in circles[kind]]
        count = sum(objective.denominator(batch) for batch in batches)
        one = {kind: torch.tensor(1.0, dtype=torch.float64)}
        said = [pretrainer(batch, phase="push", names=[kind], factors=one, key=KEY) for batch in batches]
        loss = loss + weight * sum(each.total for each in said) / count
    loss.backward()
    return flat(pretrainer)


def apart(found: list[float], expected: Tensor) -> float:
    return float((torch.tensor(found, dtype=torch.float64) - expected).norm() / expected.norm())


EACH = [["pairs"], ["more"], ["books"]]
CIRCLES: dict[Pool, list[list[str]]] = {"source": [["pairs"], ["more"]], "all": [["pairs", "more"]]}


@pytest.fixture(scope="module")
def expected() -> dict[tuple[tuple[str, ...], Pool], Tensor]:
    """`source`: the circle of each source. `all`: one circle of all that feed the objective."""
    found: dict[tuple[tuple[str, ...], Pool], Tensor] = {}
    for kinds in MIXES:
        for pool, circle in CIRCLES.items():
            found[kinds, pool] = reference(kinds, {kind: EACH if kind == "lm" else circle for kind in kinds})
    return found


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("pool_of", ["source", "all"])
@pytest.mark.parametrize("kinds", MIXES, ids="+".join)
def test_the_gradient_is_that_of_the_formula(pool, expected, kinds, pool_of, world, micro_batches):
    """On any ranks and micro-batches. The last source has no images: DDP sums those of the others."""
    results = pool.run(gradient, world, kinds=kinds, micro_batches=micro_batches, pool=pool_of)
    assert max(apart(found, expected[kinds, pool_of]) for found, _ in results) <= 1e-9


@pytest.mark.parametrize("world", [1, 2])
def test_the_order_of_sources_does_not_matter_to_the_gradient(pool, expected, world):
    sources = ("books", "more", "pairs")
    for found, _ in pool.run(gradient, world, kinds=("itc", "lm"), micro_batches=2, sources=sources):
        assert apart(found, expected[("itc", "lm"), "source"]) <= 1e-9


def test_the_circle_of_contrast_makes_a_difference(expected):
    for kinds in MIXES:
        assert apart(expected[kinds, "all"].tolist(), expected[kinds, "source"]) > 1e-3


def test_two_sources_of_one_objective_are_one_mean():
    """Captions of two sources are one batch of captions: no mean of means."""
    found, _ = gradient(ALONE, ("lm",), sources=("pairs", "more"))
    merged = reference(("lm",), {"lm": [["pairs", "more"]]})
    means = [reference(("lm",), {"lm": [[name]]}) for name in ("pairs", "more")]
    assert apart(found, merged) <= 1e-12
    assert apart(found, (means[0] + means[1]) / 2) > 1e-3


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_an_objective_sees_its_sources_and_no_other(pool, world, micro_batches):
    """Disjoint: one source contrasts, another is captioned. Towers run for what is read, and no more."""
    feeds = {"pairs": ("itc",), "more": ("lm",)}
    expected = reference(("itc", "lm"), {"itc": [["pairs"]], "lm": [["more"]]})
    results = pool.run(
        gradient, world, kinds=("itc", "lm"), micro_batches=micro_batches, sources=tuple(feeds), feeds=feeds
    )
    again = micro_batches if micro_batches > 1 else 0
    for found, runs in results:
        assert apart(found, expected) <= 1e-9
        assert runs == {
            "image": 2 * micro_batches + again,
            "text": micro_batches + again,
            "captioner": micro_batches,
        }


def test_texts_alone_run_the_decoder_alone():
    _, runs = gradient(ALONE, ("itc", "lm"), 3, sources=("books",))
    assert runs == {"image": 0, "text": 0, "captioner": 3}


STEPS = (("pairs", "more", "books"), ("books",), ("more",), ("pairs", "books"))


def trained(ranks: Ranks, micro_batches: int = 1) -> tuple[list[float], list[dict[str, float]]]:
    """Weights after four steps whose sources differ, and what was reported of each."""
    pretrainer = tiny_pretrainer(("itc", "lm"), ranks.group, feeds=feeding(("itc", "lm")))
    setup = Setup(wrapped=wrap(pretrainer, ranks), compute=COMPUTE)
    optimizer = torch.optim.AdamW(pretrainer.parameters(), lr=0.01, weight_decay=0.1)
    reports: list[dict[str, float]] = []
    for step, sources in enumerate(STEPS):
        batches = pieces(sources, ranks, micro_batches)
        done = train_step(
            setup,
            batches,
            optimizer,
            counts=agree(setup, batches).counts,
            weights=weights_of(("itc", "lm")),
            largest_norm=1.0,
            key=(0, step),
        )
        norms = {f"norm/{tower}": float(norm) for tower, norm in done.norms.by_tower.items()}
        reports.append({at: float(value) for at, value in done.values.items()} | norms)
    return nn.utils.parameters_to_vector(pretrainer.parameters()).tolist(), reports


def test_an_objective_that_a_step_does_not_feed_has_no_value_in_it():
    _, reports = trained(ALONE)
    lm = {"loss", "loss/lm", "lm/accuracy"}
    both = lm | {"loss/itc", "itc/accuracy"}
    towers = {"norm/image", "norm/text", "norm/captioner", "norm/objectives"}
    assert [set(report) for report in reports] == [
        both | towers, lm | {"norm/captioner"}, both | towers, both | towers,
    ]  # fmt: skip
    assert reports[1]["loss"] == pytest.approx(2 * reports[1]["loss/lm"], rel=1e-12)
    assert reports[2]["loss"] == pytest.approx(reports[2]["loss/itc"] + 2 * reports[2]["loss/lm"], rel=1e-12)


@pytest.mark.parametrize(("world", "micro_batches"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_steps_of_differing_sources_train_alike_on_any_ranks(pool, world, micro_batches):
    """One wrapper over all of them, also over a step that reaches no tower of images."""
    expected, reports = trained(ALONE)
    for found, said in pool.run(trained, world, micro_batches=micro_batches):
        assert apart(found, torch.tensor(expected, dtype=torch.float64)) <= 1e-9
        for one, other in zip(said, reports, strict=True):
            assert one == pytest.approx(other, rel=1e-7)


def test_without_feeds_every_objective_sees_every_source():
    assert tiny_pretrainer(("itc", "lm")).fed_by("whatever") == ["itc", "lm"]
