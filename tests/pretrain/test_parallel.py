"""However a run is spread over processes and memory, it is the run of one process."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from datasets.batch import Batch
from datasets.errors import UserError
from objectives import OBJECTIVES, objective_class
from objectives.base import Widths
from pretrain import launch, loop
from pretrain.blocks import blocks_of
from pretrain.cli import parse
from pretrain.clipping import gradient_norms
from pretrain.distributed import Ranks, shard_mesh
from pretrain.optim import Optim, build_optimizer
from pretrain.parallel import Spread, wrap
from pretrain.precision import Compute, Precision, keep_in_bf16
from pretrain.preempt import Preemption
from pretrain.pretrainer import Pretrainer
from pretrain.sinks.jsonl import read
from pretrain.step import Setup, agree, backward, train_step
from pretrain.testing import make_samples, split
from pretrain.zoo.captioner import Captioner
from pretrain.zoo.dual import Dual
from pretrain.zoo.fusion import Fusion
from pretrain.zoo.generate import greedy
from pretrain.zoo.text import build_small_text
from pretrain.zoo.vision import Small, build_small

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
SAMPLES = 23
STEPS = 50
FSDP = {"parallel": "fsdp"}
SPREADS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {}),
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
    ranks: Ranks,
    kinds: Sequence[str],
    spread: dict[str, Any],
    *,
    double: bool,
    bf16: bool = False,
    rounded: bool = False,
) -> Setup:
    ranks = replace(ranks, local=spread.get("local", ranks.world))
    feeds = {"pairs": kinds, "texts": [kind for kind in kinds if kind == "lm"]}
    pretrainer = stacked_pretrainer(kinds, ranks.group, feeds)
    pretrainer = pretrainer if double else pretrainer.float()
    if rounded:
        keep_in_bf16(pretrainer)
    how = Spread(**{key: value for key, value in spread.items() if key != "local"})
    compute = Compute(device=ranks.device, bf16=bf16)
    return Setup(wrapped=wrap(pretrainer, ranks, how, bf16=bf16), compute=compute)


def gradient(
    ranks: Ranks, kinds: Sequence[str], spread: dict[str, Any], micro_batches: int
) -> tuple[list[float], list[float]]:
    """The gradient of one step in float64, and its norms by tower."""
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


MIXES = [tuple(kind for kind in OBJECTIVES if kind != "itc"), tuple(OBJECTIVES)]
"""With a bias of the model's own, and without."""


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


PLAN = (("pairs", "texts"), ("texts",), ("pairs",))
"""The sources of each step, over and over."""
KINDS = tuple(OBJECTIVES)


def losses(
    ranks: Ranks, spread: dict[str, Any], *, autocast: bool = False, rounded: bool = False
) -> tuple[list[float], list[str]]:
    """What 50 steps of every objective on two sources report, and the names of what is saved of it."""
    setup = setup_of(ranks, KINDS, spread, double=False, bf16=autocast, rounded=rounded)
    pretrainer = setup.wrapped.pretrainer
    optimizer = build_optimizer(pretrainer, Optim(lr=1e-3))
    given = [pieces(sources, ranks, 1) for sources in PLAN]
    found: list[float] = []
    for step in range(STEPS):
        batches = given[step % len(given)]
        done = train_step(
            setup,
            batches,
            optimizer,
            counts=agree(setup, batches).counts,
            weights=dict.fromkeys(KINDS, 1.0),
            largest_norm=1.0,
            key=(0, step),
        )
        found.append(float(done.values["loss"]))
    return found, list(pretrainer.state_dict())


@pytest.fixture(scope="module")
def trained() -> tuple[list[float], list[str]]:
    return losses(ALONE, {})


@pytest.mark.slow
@pytest.mark.parametrize("spread", SPREADS)
def test_fifty_steps_have_the_losses_of_one_process(pool, trained, spread):
    """And what is saved has the same names."""
    world, how = SPREADS[spread]
    assert trained[0][-2] < 0.5 * trained[0][0]  # of both sources
    for found, names in pool.run(losses, world, spread=how):
        assert found == pytest.approx(trained[0], rel=2e-5)
        assert names == trained[1]


@pytest.mark.slow
@pytest.mark.parametrize(("spread", "rounded"), [("ddp", False), ("fsdp", False), ("fsdp", True)])
def test_fifty_steps_in_bf16_have_the_losses_of_one_process(pool, spread, rounded):
    """Sums over other rows round to another last of eight bits, and training goes on from there."""
    world, how = SPREADS[spread]
    expected, _ = losses(ALONE, {}, autocast=True, rounded=rounded)
    for found, _ in pool.run(losses, world, spread=how, autocast=True, rounded=rounded):
        assert found == pytest.approx(expected, rel=5e-2)


def test_shards_travel_in_what_autocast_would_round_them_to(pool):
    """So that mixed precision is the same arithmetic with shards and without, on as many ranks."""
    whole, shards = (
        pool.run(mixed_gradient, 2, spread=SPREADS[name][1]) for name in ("ddp", "checkpointed-fsdp")
    )
    for (expected, _), (found, _) in zip(whole, shards, strict=True):
        assert apart(found, expected) <= 1e-6
    if "param_dtype_override_fn" in MixedPrecisionPolicy.__dataclass_fields__:
        assert [kinds for _, kinds in shards] == [{"weight": "bfloat16", "bias": "float32"}] * 2


def mixed_gradient(ranks: Ranks, spread: dict[str, Any]) -> tuple[list[float], dict[str, str]]:
    """The gradient of a step under autocast, and what a linear layer of a block computes with."""
    setup = setup_of(ranks, KINDS, spread, double=False, bf16=True)
    block, kinds = blocks_of(setup.wrapped.pretrainer.model)[0], {}
    linear = next(part for part in block.modules() if isinstance(part, nn.Linear))
    linear.register_forward_pre_hook(
        lambda part, _: kinds.update({n: str(p.dtype)[6:] for n, p in part.named_parameters()})
    )
    batches = pieces(("pairs",), ranks, 1)
    counts = agree(setup, batches).counts
    factors = {kind: setup.wrapped.divided / count for kind, count in counts.items()}
    backward(setup, batches, factors, key=(0, 0))
    return flat(setup.wrapped.pretrainer, gradients=True).tolist(), kinds


def test_each_rank_holds_its_share(pool):
    """Among all, among those of a machine; the temperature is everywhere. Moments are as large."""
    total = sum(parameter.numel() for parameter in stacked_pretrainer(KINDS, None).parameters())
    for spread, parts in {"fsdp-4": 4, "by-node": 2}.items():
        world, how = SPREADS[spread]
        shares = pool.run(held, world, spread=how)
        assert max(shares) <= 1.3 * total / parts  # rows that do not divide are the first ranks'
        assert sum(shares) == pytest.approx(total * world / parts, rel=0.01)


def held(ranks: Ranks, spread: dict[str, Any]) -> int:
    setup = setup_of(ranks, KINDS, spread, double=False)
    scale = setup.wrapped.pretrainer.model.logit_scale
    assert not isinstance(scale, DTensor)
    assert scale.dtype == torch.float32
    parameters = setup.wrapped.pretrainer.parameters()
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)


@pytest.mark.parametrize("before", [True, False], ids=["before-training", "between-steps"])
def test_one_rank_alone_may_run_a_whole_model(pool, before):
    """Before the first step and between two; steps go on as if nothing had been looked at."""
    expected = looked(ALONE, spread={}, before=before)
    for found in pool.run(looked, 2, spread=FSDP, before=before):
        assert found[0] == pytest.approx(expected[0], rel=1e-9, abs=1e-12)
        assert apart(found[1], expected[1]) <= 1e-9
        assert found[2] == expected[2]


def looked(ranks: Ranks, spread: dict[str, Any], before: bool) -> tuple[list[float], list[float], list[int]]:
    """What rank zero sees inside, the gradient of the step after it, and captions."""
    setup = setup_of(ranks, KINDS, spread, double=True)
    model, batches = setup.wrapped.pretrainer.model, pieces(("pairs",), ranks, 1)
    counts = agree(setup, batches).counts
    factors = {kind: setup.wrapped.divided / count for kind, count in counts.items()}
    if not before:
        backward(setup, batches, factors, key=(0, 0))
        setup.wrapped.pretrainer.zero_grad()
    batch = split(make_samples(6), ALONE, 1)[0]
    with setup.wrapped.whole(), torch.no_grad():
        seen: list[float] = []
        said: list[list[int]] = []
        for _ in range(1 + ranks.rank):  # ranks are on their own
            features = model.encode_image(batch.images)
            seen = features["image"].flatten().tolist()
            assert model.captioner is not None
            said = greedy(model.captioner, features["image_tokens"], start=1, end=2)
    backward(setup, batches, factors, key=(0, 0))
    return seen, flat(setup.wrapped.pretrainer, gradients=True).tolist(), [len(each) for each in said]


def test_machines_of_unequal_size_share_among_all(pool):
    assert pool.run(mesh, 4, local=[2, 2, 2, 2]) == [((2, 2), ("replicate", "shard"))] * 4
    for local in ([3, 3, 3, 1], [1, 1, 1, 1], [4, 4, 4, 4]):
        assert pool.run(mesh, 4, local=local) == [((4,), ("shard",))] * 4


def mesh(ranks: Ranks, local: list[int]) -> tuple[tuple[int, ...], Any]:
    found = shard_mesh(replace(ranks, local=local[ranks.rank]), by_node=True)
    return tuple(found.shape), found.mesh_dim_names


def test_what_does_not_go_together_is_refused():
    for spread, kinds, elastic, says in [
        (Spread(offload=True), {"one": "adamw"}, False, "--offload is about shards"),
        (Spread(shard="all"), {"one": "adamw"}, False, "--shard all is about shards"),
        (Spread(parallel="fsdp"), {"one": "adamw", "two": "muon"}, False, "--stages.two.optim.kind muon"),
        (Spread(parallel="fsdp"), {"one": "adamw"}, True, "--deterministic elastic"),
    ]:
        with pytest.raises(UserError, match=says):
            spread.check(kinds, elastic=elastic)
    Spread(parallel="fsdp", offload=True).check({"one": "adamw"}, elastic=False)
    with pytest.raises(UserError, match="--offload is for the shards of several processes"):
        wrap(stacked_pretrainer(("itc",), None), ALONE, Spread(parallel="fsdp", offload=True))
    with pytest.raises(UserError, match=r"--precision.parameters bf16 needs products in bf16"):
        Precision(parameters="bf16", autocast="off").check()


RUN = (
    "--objectives itc,lm --stages.one.steps 30 --stages.one.batch 16 --stages.one.resolution 16 "
    "--stages.one.optim.kind adamw --stages.one.optim.warmup 2 --vocabulary 300 --model.embed 16 "
    "--model.text.width 16 --model.text.layers 2 --model.captioner.width 16 --model.captioner.layers 2 "
    "--cadence.report 5 --cadence.checkpoint 10 --precision.threads 1 --wandb.mode disabled "
    "--precision.autocast off --loader-threads 1 --eval.every 20 --stages.one.optim.lr 0.0005"
)


@pytest.mark.slow
def test_a_run_with_shards_is_evaluated_saved_and_resumed_as_one_without(pool, tmp_path):
    """Stopped half-way; it goes on with shards, and another of its starts without."""
    flags = {"ddp": RUN, "fsdp": f"{RUN} --parallel fsdp --activation-checkpointing"}
    for name, first in {"straight": "ddp", "shards": "fsdp", "both": "fsdp"}.items():
        stop = None if name == "straight" else 14  # saves step 15
        codes = pool.run(launched, 2, flags=f"{flags[first]} --out {tmp_path / name}", stop=stop)
        assert codes == [launch.INTERRUPTED if stop else launch.DONE] * 2
    assert pool.run(launched, 2, flags=f"{flags['fsdp']} --out {tmp_path / 'shards'}") == [launch.DONE] * 2
    assert pool.run(launched, 2, flags=f"{flags['ddp']} --out {tmp_path / 'both'}") == [launch.DONE] * 2
    expected = recorded(tmp_path / "straight")
    assert {step for step, _ in expected} >= {5, 10, 15, 20, 25, 30}
    for name in ("shards", "both"):
        # Of an evaluation, one of some hundred images may change its mind.
        assert recorded(tmp_path / name) == {
            at: pytest.approx(value, rel=1e-4, abs=0.01 if at[1].startswith("eval/") else 0)
            for at, value in expected.items()
        }
    assert (tmp_path / "shards" / "samples" / "step-00000020.json").exists()


def recorded(out: Path) -> dict[tuple[int, str], float]:
    names = ("train/loss", "model/logit_scale", "eval/")
    return {
        (record["step"], name): value
        for record in read(out / "metrics.jsonl")
        for name, value in record.items()
        if name.startswith(names)
    }


def launched(ranks: Ranks, flags: str, stop: int | None = None) -> int:
    """Run a command line on these ranks; a stop is asked for in a step."""
    preemption = Preemption()

    def stopping(*arguments: Any, key: tuple[int, int], **options: Any) -> Any:
        if key[1] == stop:
            preemption.requested = "SIGTERM"
        return train_step(*arguments, key=key, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", stopping)
        patch.setattr(launch, "show", lambda training: None)
        return launch.launch(parse(flags.split()), replace(ranks, local=ranks.world), preemption)
