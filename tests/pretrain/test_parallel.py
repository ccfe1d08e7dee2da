"""However a run is spread over processes and memory, it is the run of one process."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from datasets.batch import Batch
from objectives import OBJECTIVES, objective_class
from objectives.base import Widths
from pretrain.distributed import Ranks
from pretrain.parallel import Spread, wrap
from pretrain.precision import Compute
from pretrain.pretrainer import Pretrainer
from pretrain.step import Setup, agree, backward
from pretrain.testing import make_samples, split
from pretrain.zoo.captioner import Captioner
from pretrain.zoo.dual import Dual
from pretrain.zoo.fusion import Fusion
from pretrain.zoo.text import build_small_text
from pretrain.zoo.vision import Small, build_small

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
SAMPLES = 23
STEPS = 50
FSDP = {"parallel": "fsdp"}
SPREADS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {}),
    "ddp-4": (4, {}),
    "fsdp": (2, FSDP),
    "fsdp-4": (4, FSDP),
    "by-node": (4, {**FSDP, "local": 2}),
    "checkpointed": (1, {"activation_checkpointing": True}),
    "checkpointed-ddp": (2, {"activation_checkpointing": True}),
    "checkpointed-fsdp": (2, {**FSDP, "activation_checkpointing": True}),
    "offloaded": (2, {**FSDP, "offload": True}),
}
"""Ranks, and how they share."""


def stacked_pretrainer(kinds: Sequence[str], group: Any, feeds: Any = None) -> Pretrainer:
    """Real towers of two blocks each, in float64; the same in every process."""
    torch.manual_seed(0)
    image = build_small(Small(patch=4, width=8, depth=2, heads=2), resolution=8)
    image.measure(resolution=8, embed=6)
    text = build_small_text(vocabulary=20, width=8, layers=2, heads=2, context_length=16, embed=6, end_id=19)
    config = Captioner.Config(width=8, layers=2, heads=2)
    model = Dual(
        image=image,
        text=text,
        captioner=Captioner(config, image_width=8, vocabulary=20, context_length=16),
        fusion=Fusion(Fusion.Config(), text=text, image_width=8),
        logit_scale=torch.tensor(1.5),
        logit_bias=torch.tensor(-2.0) if "itc" not in kinds else None,
    )
    contrastive = {kind for kind in kinds if objective_class(kind).temperature}
    borrower = next((kind for kind in kinds if kind in contrastive), None)
    objectives = {
        kind: objective_class(kind)(
            objective_class(kind).Config(),
            Widths(
                embed=6,
                image_tokens=8,
                text_tokens=8,
                vocabulary=20,
                temperature=kind == borrower,
                contrast=bool(contrastive - {kind}),
            ),
        )
        for kind in kinds
    }
    return Pretrainer(model, objectives, group, feeds=feeds).double()


def samples_of(source: str) -> list[Batch]:
    """Pairs, or texts without images."""
    if source == "pairs":
        return make_samples(SAMPLES)
    return [
        replace(
            sample,
            images=sample.images[:0],
            image_valid=sample.image_valid[:0],
            image_index=torch.full_like(sample.image_index, -1),
        )
        for sample in make_samples(10, seed=2)
    ]


def pieces(sources: Sequence[str], ranks: Ranks, micro_batches: int) -> list[Batch]:
    return [
        replace(piece, source=source)
        for source in sources
        for piece in split(samples_of(source), ranks, micro_batches)
    ]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def flat(module: nn.Module, *, gradients: bool) -> Tensor:
    parts = []
    for parameter in module.parameters():
        value = parameter.grad if gradients else parameter
        parts.append(torch.zeros(parameter.shape) if value is None else whole(value.detach()))
    return torch.cat([part.double().flatten() for part in parts])


def setup_of(
    ranks: Ranks, kinds: Sequence[str], spread: dict[str, Any], *, double: bool, bf16: bool = False
) -> Setup:
    ranks = replace(ranks, local=spread.get("local", ranks.world))
    feeds = {"pairs": kinds, "texts": [kind for kind in kinds if kind == "lm"]}
    pretrainer = stacked_pretrainer(kinds, ranks.group, feeds)
    pretrainer = pretrainer if double else pretrainer.float()
    how = Spread(**{key: value for key, value in spread.items() if key != "local"})
    compute = Compute(device=ranks.device, bf16=bf16)
    return Setup(wrapped=wrap(pretrainer, ranks, how, bf16=bf16), compute=compute)


def gradient(
    ranks: Ranks, kinds: Sequence[str], spread: dict[str, Any], micro_batches: int
) -> tuple[list[float], list[float]]:
    """The gradient of one step in float64, and its norms by tower."""
    from pretrain.clipping import gradient_norms

    setup = setup_of(ranks, kinds, spread, double=True)
    sources = ("pairs", "texts") if "lm" in kinds else ("pairs",)
    batches = pieces(sources, ranks, micro_batches)
    counts = agree(setup, batches).counts
    weights = {kind: 1.0 + place for place, kind in enumerate(kinds)}
    factors = {kind: weights[kind] * setup.wrapped.divided / count for kind, count in counts.items()}
    backward(setup, batches, factors, key=(0, 0))
    norms = gradient_norms(setup.wrapped.pretrainer)
    found = [float(norms.whole), *(float(norm) for _, norm in sorted(norms.by_tower.items()))]
    return flat(setup.wrapped.pretrainer, gradients=True).tolist(), found


def apart(found: list[float], expected: list[float]) -> float:
    one, other = (torch.tensor(each, dtype=torch.float64) for each in (found, expected))
    return float((one - other).norm() / other.norm())


MIXES = [("itc", "lm"), tuple(kind for kind in OBJECTIVES if kind != "itc"), tuple(OBJECTIVES)]


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, ...], tuple[list[float], list[float]]]:
    return {kinds: gradient(ALONE, kinds, {}, 1) for kinds in MIXES}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("kinds", MIXES, ids="+".join)
def test_the_gradient_is_that_of_one_process(pool, expected, kinds, spread, micro_batches):
    """Also of a source that reaches no image tower, and its norms by tower."""
    world, how = SPREADS[spread]
    for found, norms in pool.run(gradient, world, kinds=kinds, spread=how, micro_batches=micro_batches):
        assert apart(found, expected[kinds][0]) <= 1e-9
        assert norms == pytest.approx(expected[kinds][1], rel=1e-9)
