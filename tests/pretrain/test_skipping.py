"""Runs that meet numbers that are not finite: skipped, written down, replayed alike, and stopped in time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets.errors import UserError
from objectives.base import Terms
from objectives.lm import LM
from pretrain import launch, loop
from pretrain.cli import parse
from pretrain.distributed import Ranks, SaidByRankZeroError
from pretrain.evaluate import during
from pretrain.evaluate.results import Result
from pretrain.preempt import Preemption
from pretrain.sinks import jsonl

STEPS = 14
NAN = "7ff8000000000000"
POISONED = "model.logit_scale"
FLAGS = (
    f"--objectives itc,lm --stages.one.steps {STEPS} --stages.one.batch 8 --stages.one.resolution 32 "
    "--stages.one.optim.warmup 2 --vocabulary 300 --model.embed 16 --model.text.width 16 "
    "--model.text.layers 1 --model.captioner.width 16 --model.captioner.layers 1 --cadence.report 2 "
    "--cadence.checkpoint 3 --loader-threads 1 --precision.threads 1 --wandb.mode disabled"
)


def launched(
    ranks: Ranks, out: str, *, bad: tuple[str, ...] = (), die: int = -1, poison: int = -1, more: str = ""
) -> tuple[str, list[list[str]]]:
    """Run it with a loss of NaN for bad samples; how it ended, and the keys of this rank's steps.

    Args:
        ranks: who.
        out: run directory.
        bad: keys of samples.
        die: a step before which the process goes.
        poison: a step after which a moment is NaN.
        more: flags.
    """
    said, take, keys = LM.forward, loop.train_step, []

    def forward(self: LM, encodings: Any, batch: Any) -> Terms:
        terms = said(self, encodings, batch)
        return Terms(terms.total * float("nan"), terms.metrics) if set(bad) & {*batch.keys} else terms

    def train_step(setup: Any, batches: Any, optimizer: Any, **named: Any) -> Any:
        if named["key"][1] == die:
            raise KeyboardInterrupt
        keys.append([name for batch in batches for name in batch.keys])
        done = take(setup, batches, optimizer, **named)
        if named["key"][1] == poison and ranks.rank == 0:
            parameter = setup.wrapped.pretrainer.get_parameter(POISONED)
            optimizer.state[parameter]["exp_avg"][0] = float("nan")
        return done

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, Preemption() as preemption:
        patch.setattr(during, "_examine", lambda training: {"nothing": Result(value=0.0)})
        patch.setattr(during, "_show", lambda *_: None)
        patch.setattr(launch, "show", lambda training: None)
        patch.setattr(LM, "forward", forward)
        patch.setattr(loop, "train_step", train_step)
        try:
            ended = str(launch.launch(parse(f"{FLAGS} {more} --out {out}".split()), ranks, preemption))
        except KeyboardInterrupt:
            ended = "died"
        except SaidByRankZeroError:
            ended = "said by rank zero"
        except UserError as error:
            ended = str(error)
    return ended, keys


def lines(out: Path) -> list[str]:
    return (out / "ledger").read_text().splitlines()


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())


def final(out: Path, name: str = "model.safetensors") -> bytes:
    return (out / "checkpoints" / f"step-{STEPS:08d}" / name).read_bytes()


@pytest.fixture(scope="module")
def keys(pool, tmp_path_factory) -> list[list[str]]:
    """The samples of each step."""
    ((ended, found),) = pool.run(launched, 1, out=str(tmp_path_factory.mktemp("good") / "run"))
    assert ended == "0"
    assert len(found) == STEPS
    return found


@pytest.fixture(scope="module", params=[1, 2])
def spoiled(pool, keys, tmp_path_factory, request) -> tuple[int, Path]:
    """An uninterrupted run whose step 8 has two bad samples, one in each half of its batch."""
    out = tmp_path_factory.mktemp("spoiled") / "run"
    results = pool.run(launched, request.param, out=str(out), bad=(keys[7][1], keys[7][6]))
    assert [ended for ended, _ in results] == ["0"] * request.param
    return request.param, out


def test_one_step_is_skipped_counted_and_explained(spoiled, keys):
    world, out = spoiled
    (line,) = jsonl.read(out / "faults.jsonl")
    named = [
        {"rank": world - 1 if place == 6 else 0, "source": "data", "key": keys[7][place]} for place in (1, 6)
    ]
    assert line == {
        "step": 8, "kind": "loss", "objectives": ["lm"],
        "towers": line["towers"], "samples": 2,
        "named": [{**one, "reason": "loss of lm"} for one in named],
    }  # fmt: skip
    assert "captioner" in line["towers"]
    records = list(jsonl.read(out / "metrics.jsonl"))
    assert all(each["train/loss"] is not None for each in records if "train/loss" in each)
    counts = {each["step"]: each["train/skipped"] for each in records if "train/skipped" in each}
    assert {step: count for step, count in counts.items() if count} == dict.fromkeys((8, 9, 10, 12, 14), 1)
    state = json.loads(final(out, "state.json"))
    assert (state["skipped"], state["streak"], state["samples"]) == ({"loss": 1}, 0, 8 * STEPS)
    not_finite = [line.split()[0] for line in lines(out) if line.split()[3] == NAN]
    assert not_finite == ["8"]


@pytest.mark.slow
@pytest.mark.parametrize("die", [8, 9], ids=["right after it", "one later"])
def test_killed_and_resumed_over_it_the_run_decides_the_same(pool, spoiled, keys, tmp_path, die):
    world, straight = spoiled
    out, bad = tmp_path / "run", (keys[7][1], keys[7][6])
    assert {ended for ended, _ in pool.run(launched, world, out=str(out), bad=bad, die=die)} == {"died"}
    assert {ended for ended, _ in pool.run(launched, world, out=str(out), bad=bad)} == {"0"}
    assert (out / "ledger").read_bytes() == (straight / "ledger").read_bytes()
    assert (out / "faults.jsonl").read_bytes() == (straight / "faults.jsonl").read_bytes()
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert final(out, name) == final(straight, name)


@pytest.mark.parametrize("world", [1, 2])
def test_a_declared_number_in_a_row_ends_the_run_and_the_checkpoint_before_stays(pool, keys, tmp_path, world):
    """Four of five steps are bad, then all: the fourth is forgotten, the third in a row is not."""
    out = tmp_path / "run"
    bad = tuple(keys[step][0] for step in (1, 2, 4, 5, 6, 7))
    first, *others = [
        ended for ended, _ in pool.run(launched, world, out=str(out), bad=bad, more="--bad.steps 3")
    ]
    assert others == ["said by rank zero"] * (world - 1)
    assert first.startswith("3 steps in a row, the last of them step 7, were skipped: the loss of lm is not")
    assert f"(sample {keys[6][0]} (loss of lm))" in first
    assert "--bad.steps" in first
    # Step 3 ended a streak of its own and step 6 was in one: neither wrote a checkpoint.
    assert "no checkpoint was written before" in first
    assert not (out / "checkpoints").exists()
    assert [int(line.split()[0]) for line in lines(out)] == list(range(1, 8))
    # With more allowed, the same run goes on, over the same steps.
    before = lines(out)
    assert {ended for ended, _ in pool.run(launched, world, out=str(out), bad=bad)} == {"0"}
    assert lines(out)[:7] == before
    assert [each["step"] for each in jsonl.read(out / "faults.jsonl")] == [2, 3, 5, 6, 7, 8]
    assert json.loads(final(out, "state.json"))["skipped"] == {"loss": 6}


@pytest.mark.parametrize(("poison", "skipped"), [(3, 1), (4, 0)], ids=["by the next loss", "by the save"])
@pytest.mark.parametrize("world", [1, 2])
def test_weights_that_are_not_finite_are_never_saved(pool, keys, tmp_path, world, poison, skipped):
    """A moment is spoiled on one rank after a step; the next step makes weights of it."""
    out = tmp_path / "run"
    first, *others = [ended for ended, _ in pool.run(launched, world, out=str(out), poison=poison)]
    assert others == ["said by rank zero"] * (world - 1)
    assert first.startswith("after step 6 the weights themselves are not finite")
    assert f"({POISONED} on rank 0, {POISONED}.exp_avg on rank 0)" in first
    assert "the checkpoint of step 3 is the last good one" in first
    assert checkpoints(out) == [3]
    assert sum(line.split()[3] == NAN for line in lines(out)) == skipped
    assert {ended for ended, _ in pool.run(launched, world, out=str(out))} == {"0"}
    assert not (out / "faults.jsonl").exists()


def test_less_than_one_step_in_a_row_is_refused():
    with pytest.raises(UserError, match=r"--bad\.steps is 0; it must be at least 1"):
        parse(f"{FLAGS} --bad.steps 0 --out run".split())
