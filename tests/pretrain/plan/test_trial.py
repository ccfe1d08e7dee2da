"""A step on paper counts what the same step counts when it is run."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from datasets.batch import Batch
from pretrain.build import build_pretrainer
from pretrain.cli import parse
from pretrain.clipping import clip, gradient_norms
from pretrain.distributed import Ranks
from pretrain.flops import Counter, counting
from pretrain.memory import Alive
from pretrain.optim import build_optimizer
from pretrain.parallel import Spread, wrap
from pretrain.plan.inputs import Input, feeding, micro_batches
from pretrain.plan.leg import Parallel
from pretrain.plan.paper import Paper, pretended
from pretrain.plan.tokens import Sizes
from pretrain.plan.trial import Found, Setting, Trial
from pretrain.precision import Compute
from pretrain.step import Setup, agree, backward

CPU = torch.device("cpu")
SIZES = Sizes(300, 24)
SMALL = ["--stages.one.resolution", "32", "--model.embed", "32", "--vocabulary", "300"]
SMALL += ["--stages.one.optim.kind", "adamw"]
SOURCE = Input(name="data", holds="captions", lengths=(9, 17, 12), told="", samples=1e6)


def run_of(*arguments: str):
    return parse(["--recipe", "laptop", *SMALL, *arguments]).run


def real(batch: Batch, rank: int) -> Batch:
    """The same with pixels, and captions of this rank."""
    source = torch.Generator().manual_seed(rank)
    pixels = torch.randint(0, 256, batch.images.shape, dtype=torch.uint8, generator=source)
    return replace(batch, images=pixels, text_id=batch.text_id + 1000 * rank)


def batches_of(paper: Paper, samples: int, pieces: int) -> Sequence[Batch]:
    return micro_batches(paper, [SOURCE], {"data": samples}, pieces=pieces, resolution=32)


def on_paper(
    arguments: Sequence[str],
    *,
    world: int = 1,
    samples: int,
    pieces: int,
    parallel: Parallel = "ddp",
    bf16: bool = False,
) -> Found:
    run = run_of(*arguments)
    setting = Setting(
        run=run,
        stage="one",
        tokenizer=SIZES,
        feeds=feeding(run, "one"),
        world=world,
        per_node=8,
        parallel=parallel,
        kind="cpu",
        bf16=bf16,
    )
    with pretended(world):
        return Trial(setting).step(lambda paper: batches_of(paper, samples, pieces))


def measured(
    ranks: Ranks,
    arguments: Sequence[str],
    *,
    samples: int,
    pieces: int,
    parallel: Parallel = "ddp",
    bf16: bool = False,
) -> tuple[dict[str, int], int]:
    """FLOPs by part of a second step, and the most bytes that were alive in it."""
    run = run_of(*arguments)
    alive, counter = Alive(), Counter()
    with alive:
        pretrainer = build_pretrainer(run, SIZES, ranks, feeds=feeding(run, "one"))
        spread = Spread(parallel=parallel, activation_checkpointing=run.spread.activation_checkpointing)
        wrapped = wrap(pretrainer, ranks, spread, bf16=bf16)
        optimizer = build_optimizer(pretrainer, run.stages["one"].optim)
        counter.watch_again(pretrainer)
        for step in range(2):
            alive.peak = alive.bytes
            counter.counts.clear()
            setup = Setup(
                wrapped=wrapped,
                compute=Compute(device=CPU, bf16=bf16),
                watch=lambda part: counting(counter, part),
            )
            batches = [real(batch, ranks.rank) for batch in batches_of(Paper(), samples, pieces)]
            counts = agree(setup, batches).counts
            backward(setup, batches, {name: 1.0 / count for name, count in counts.items()}, key=(0, step))
            clip(pretrainer, gradient_norms(pretrainer).whole, largest=1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return dict(counter.counts), alive.peak


ALONE = Ranks(rank=0, world=1, device=CPU, group=None)


@pytest.mark.parametrize(
    ("objectives", "pieces"),
    [("itc", 3), ("siglip", 1), ("lm", 2), ("itm", 1), ("itc,lm,itm", 1), ("itc,lm,itm", 2)],
)
def test_the_flops_are_those_of_a_step_that_is_run(objectives, pieces):
    arguments = ["--objectives", objectives]
    assert (
        on_paper(arguments, samples=6, pieces=pieces).flops
        == measured(ALONE, arguments, samples=6, pieces=pieces)[0]
    )


def test_what_is_recomputed_is_counted_apart_on_paper_too():
    arguments = ["--objectives", "itc,lm", "--activation-checkpointing"]
    found = on_paper(arguments, samples=6, pieces=2).flops
    assert found == measured(ALONE, arguments, samples=6, pieces=2)[0]
    assert found["again"] > on_paper(["--objectives", "itc,lm"], samples=6, pieces=2).flops["again"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_memory_is_within_a_fifth_of_what_two_ranks_measure(pool, parallel, pieces):
    arguments = ["--objectives", "itc,lm"]
    options = {"samples": 8, "pieces": pieces, "parallel": parallel, "bf16": True}
    (flops, peak), _ = pool.run(measured, 2, arguments=arguments, **options)
    found = on_paper(arguments, world=2, **options)
    assert found.flops == flops
    assert found.peak == pytest.approx(peak, rel=0.2)
