"""--explain tells what a run does, and touches nothing; its figures are those of steps that are run."""

import re
from pathlib import Path

import pytest
import torch

from pretrain import launch
from pretrain.build import build_tokenizer
from pretrain.cli import parse
from pretrain.costs import Bench, few
from pretrain.data import open_data
from pretrain.distributed import Ranks
from pretrain.explain import moment_bytes, summary
from pretrain.flops import Counter, counting
from pretrain.optim import build_optimizer
from pretrain.parallel import wrap
from pretrain.precision import Compute
from pretrain.rundir import RunDir
from pretrain.step import Setup, agree, backward, train_step
from pretrain.testing import make_samples, split, tiny_pretrainer

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
COMPUTE = Compute(device=ALONE.device, bf16=False)
TINY = [
    "--stages.one.resolution",
    "32",
    "--vocabulary",
    "300",
    "--model.embed",
    "16",
    "--model.text.width",
    "16",
    "--model.text.layers",
    "1",
    "--model.captioner.width",
    "16",
    "--model.captioner.layers",
    "1",
    "--loader-threads",
    "1",
]


def bench(ranks: Ranks, kinds: tuple[str, ...], micro_batches: int) -> Bench:
    return Bench(
        pretrainer=tiny_pretrainer(kinds, ranks.group),
        feeds={"": kinds},
        batches=split(make_samples(32), ranks, micro_batches),
        ranks=ranks,
        compute=COMPUTE,
        pool="source",
        lanes=None,
        seed=0,
    )


def explained(capsys, tmp_path, *arguments: str) -> str:
    """What is printed; the run directory must not come to be."""
    out = tmp_path / "run"
    assert launch.main(["--explain", "--out", str(out), *TINY, *arguments]) == launch.DONE
    assert not out.exists()
    return capsys.readouterr().out


def row(text: str, name: str) -> list[str]:
    """The cells of a table's row."""
    (found,) = (line for line in text.splitlines() if line.startswith(f"  {name} "))
    return found.split()


def test_a_run_is_told_and_nothing_is_written(capsys, tmp_path):
    text = explained(capsys, tmp_path, "--stages.one.steps", "7", "--stages.one.batch", "24")
    assert "itc + lm on scenes: 7 steps, 168 samples" in text
    assert row(text, "itc")[1:4] == ["image,", "text", "contrast"]
    assert row(text, "lm")[1:3] == ["decoded", "no"]
    assert row(text, "image")[-2:] == ["100%", "1"], "one run for both objectives"
    one = re.split(r"  +", " ".join(row(text, "one")).replace(" ", "  ").replace(",  ", ", "))
    assert one[:5] == ["one", "0..7", "168", "itc, lm", "data"]
    assert one[5:7] + one[9:11] == ["32", "16", "24", "1"]
    assert one[-3:] == ["muon", "0.004", "cosine"]
    assert "step: 24 samples on 1 process, 1 micro-batch on each" in text
    assert "100% captions of scenes (endless) for itc, lm" in text


def test_micro_batches_of_contrast_run_their_towers_twice(capsys, tmp_path):
    text = explained(capsys, tmp_path, "--stages.one.micro-batches", "4")
    runs = {name: row(text, name)[-1] for name in ("image", "text", "captioner")}
    assert runs == {"image": "8", "text": "8", "captioner": "4"}
    assert "again to save memory" in text


def test_a_mixture_is_told_by_source(capsys, tmp_path):
    arguments = ["--data", "one=scenes", "--data", "two=scenes", "--sources.two.weight", "3"]
    text = explained(capsys, tmp_path, *arguments, "--sources.two.objectives", "lm")
    assert "  one: 25% captions of scenes (endless) for itc, lm" in text
    assert "  two: 75% captions of scenes (endless) for lm" in text


def test_a_tokenizer_that_the_run_has_is_read_and_left(capsys, tmp_path):
    command = parse(["--out", str(tmp_path), *TINY])
    data = open_data(command.run)
    build_tokenizer(command.run, data.feeds, RunDir(tmp_path), ALONE)
    before = (tmp_path / "tokenizer.json").stat()
    assert launch.main(["--explain", "--out", str(tmp_path), *TINY]) == launch.DONE
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").stat() == before
    assert "image_tokens" not in capsys.readouterr().out


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_flops_are_those_of_the_step(micro_batches):
    whole = bench(ALONE, ("itc", "lm"), micro_batches)
    counter = Counter()
    counter.watch_again(whole.pretrainer)
    setup = Setup(
        wrapped=wrap(whole.pretrainer, ALONE), compute=COMPUTE, watch=lambda part: counting(counter, part)
    )
    counts = agree(setup, whole.batches).counts
    backward(setup, whole.batches, {name: 1.0 / count for name, count in counts.items()}, key=(0, 0))
    cost = whole.measure(["itc", "lm"])
    assert 32 * cost.flops == counter.counts["forward"] + counter.counts["backward"]
    assert 32 * cost.again == counter.counts["again"]
    assert all(parameter.grad is None for parameter in whole.pretrainer.model.image.parameters())


def test_objectives_share_the_towers_that_both_read():
    given = bench(ALONE, ("itc", "lm"), 1)
    both, itc, lm = given.measure(["itc", "lm"]), given.measure(["itc"]), given.measure(["lm"])
    assert max(itc.flops, lm.flops) < both.flops < itc.flops + lm.flops
    assert both.runs == {"image": 1, "text": 1, "captioner": 1}
    assert itc.runs == {"image": 1, "text": 1}
    assert lm.runs == {"image": 1, "captioner": 1}
    assert itc.held[1] > 0


def cost_of(ranks: Ranks) -> tuple[dict[str, int], float]:
    cost = bench(ranks, ("itc", "lm"), 2).measure(["itc", "lm"])
    return dict(cost.runs), cost.flops


def test_ranks_measure_together(pool):
    for runs, flops in pool.run(cost_of, 2):
        assert runs == {"image": 4, "text": 4, "captioner": 2}
        assert flops > 0


def test_a_few_samples_of_a_batch_keep_its_length_and_their_texts():
    (batch,) = split(make_samples(12), ALONE, 1)
    cut = few(batch, 5)
    assert len(cut.images) == len(cut.keys) == 5
    assert cut.image_index.max() == 4
    assert cut.tokens.shape[1] == batch.tokens.shape[1]
    assert torch.equal(cut.tokens, batch.tokens[: len(cut.tokens)])


@pytest.mark.parametrize("kind", ["adamw", "lion", "muon"])
def test_moments_are_those_that_the_optimizer_makes(kind):
    run = parse([*TINY, "--stages.one.optim.kind", kind]).run
    pretrainer = tiny_pretrainer(("itc", "lm"))
    optimizer = build_optimizer(pretrainer, run.stages["one"].optim)
    setup, batches = Setup(wrapped=wrap(pretrainer, ALONE), compute=COMPUTE), split(make_samples(8), ALONE, 1)
    counts = agree(setup, batches).counts
    weights = {"itc": 1.0, "lm": 1.0}
    train_step(setup, batches, optimizer, counts=counts, weights=weights, largest_norm=0.0, key=(0, 0))
    kept = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    )
    single = 2 * 8 * sum(p in optimizer.state for p in pretrainer.parameters() if p.numel() == 1)
    unused = sum(2 * p.nbytes for p in pretrainer.parameters() if p not in optimizer.state)
    optim = run.stages["one"].optim
    assert moment_bytes(optim, pretrainer) - unused == pytest.approx(kept + single, abs=2 * unused)


def test_two_lines_sum_it_up():
    passes, parameters = summary(tiny_pretrainer(("itc", "lm")))
    assert passes == "passes: itc reads image, text; lm reads decoded"
    assert parameters.startswith("parameters: ")
    assert parameters.endswith("100% trained")


def test_the_stages_are_told_and_drawn(capsys, tmp_path):
    """What differs from stage to stage and inside one: sizes, tokens, objectives, and what trains."""
    recipe = Path(__file__).with_name("three_stages.py")
    out = tmp_path / "three"
    assert launch.main(["--recipe", str(recipe), "--explain", "--out", str(out)]) == launch.DONE
    text = capsys.readouterr().out
    assert not out.exists()
    lines = text[text.index("  stage ") :].splitlines()
    rows = [re.split(r"  +", line.strip()) for line in lines[1:5]]
    assert [row[:4] for row in rows] == [
        ["one", "0..6", "96", "lm"],
        ["two", "6..10", "128", "itc, lm"],
        ["two", "10..14", "64", "itc, lm"],
        ["three", "14..18", "64", "itc, lm"],
    ]
    # Pixels, then tokens: a patch of 8 px each, and those of the captions.
    assert [row[5] for row in rows] == ["16", "16", "24", "24"]
    assert [row[6].split(" + ")[0] for row in rows] == ["4", "4", "9", "9"]
    assert [row[7:9] for row in rows] == [["16", "1"], ["32", "1"], ["16", "2"], ["16", "1"]]
    texts = float(rows[0][6].split(" + ")[1])
    assert [float(row[9].replace(",", "")) for row in rows] == pytest.approx(
        [batch * (image + texts) for batch, image in ((16, 4), (32, 4), (16, 9), (16, 9))], rel=0.005
    )
    assert [row[-1] for row in rows[1:]] == ["kept", "kept", "fresh"]
    assert "22,433 (3%)" in lines[4]  # captioner, text tower and temperature; the image tower is frozen
    picture = tmp_path / "three-timeline.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"drawn in {picture}" in text
