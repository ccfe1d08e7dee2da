"""Stages follow each other in one command or in several, killed wherever, with the same bits."""

import os
import re
import shutil
import signal
from pathlib import Path

import open_clip  # noqa: F401 (what a run imports late, so that no fork has to)
import pytest
import timm  # noqa: F401
import torch
from safetensors.torch import load_file

from pretrain import launch, loop
from pretrain.evaluate import during
from pretrain.evaluate.results import Result
from pretrain.evaluate.sheet import Sheet
from pretrain.ledger import Ledger
from pretrain.sinks import jsonl
from pretrain.starts import read_starts
from pretrain.testing import forked_ranks

RECIPE = Path(__file__).with_name("three_stages.py")
ENDS = {"one": 6, "two": 14, "three": 18}


@pytest.fixture(autouse=True, scope="module")
def _no_evaluation():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(during, "_examine", lambda training: {"nothing": Result(value=0.0)})
        patch.setattr(during, "make_sheet", lambda *_, **__: Sheet(rows=(), said_by="captioner"))
        patch.setattr(during, "save_sheet", lambda *_, **__: None)
        patch.setattr(launch, "show", lambda training: None)
        yield


def command(out: Path, more: str = "") -> list[str]:
    return f"--recipe {RECIPE} --out {out} {more}".split()


def in_child(arguments: list[str], *, dies_at: int = -1, after: str = "_advance", ranks: int = 1) -> int:
    """The exit code of a start in forks of this process; each may kill itself when a step has been done."""

    def start() -> int:
        done = getattr(loop, after)

        def die(training, *rest, **named):
            given = done(training, *rest, **named)
            if training.standing.step == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return given

        setattr(loop, after, die)
        return launch.main(arguments)

    with Path(os.devnull).open("w") as nowhere:
        leader = forked_ranks(start, ranks, nowhere.fileno())
    return os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1])


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """All stages in one command that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert in_child(command(out)) == launch.DONE
    return out


def saved(out: Path, step: int, group: str = "model") -> dict[str, torch.Tensor]:
    return load_file(out / f"checkpoints/step-{step:08d}/{group}.safetensors")


def assert_same(out: Path, straight: Path, *, ranks: bool = True) -> None:
    ours, theirs = (
        [line.split() for line in Ledger(each / "ledger").final().values()] for each in (out, straight)
    )
    for line in () if ranks else (*ours, *theirs):
        line.pop(1)
    assert ours == theirs
    for step, group in (
        (ENDS["two"], "ema"),
        (ENDS["three"], "model"),
        (ENDS["three"], "optimizer"),
    ):
        theirs, ours = saved(straight, step, group), saved(out, step, group)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_goes_through_its_stages(straight):
    assert list(Ledger(straight / "ledger").final()) == list(range(1, 19))
    records = list(jsonl.read(straight / "metrics.jsonl"))
    assert [record["step"] for record in records if "finished" in record] == list(ENDS.values())
    samples = {record["step"]: record["samples"] for record in records}
    assert (samples[6], samples[14], samples[18]) == (96, 96 + 4 * 32 + 4 * 16, 288 + 64)
    assert [(each.stage, each.step) for each in read_starts(straight / "starts.jsonl")] == [
        ("one", 0), ("two", 6), ("three", 14),
    ]  # fmt: skip
    assert max(record.get("perf/restarts", 0) for record in records) == 0
    # The first stage minimises captioning alone, the others both.
    itc = {record["step"] for record in records if "train/loss/itc" in record}
    assert min(itc) > 6
    assert itc >= {8, 10, 12, 14, 16, 18}
    lm = {record["step"]: record["train/loss/lm"] for record in records if "train/loss/lm" in record}
    assert set(lm) >= {2, 4, 6, 8}


def test_what_a_stage_does_not_train_stays_to_the_bit(straight):
    first, one, two, three = (saved(straight, step) for step in (3, *ENDS.values()))

    def moved(before, after):
        return {name for name in before if not torch.equal(before[name], after[name])}

    def towers(names):
        return {re.sub(r"^model\.(\w+).*", r"\1", name) for name in names}

    assert towers(moved(first, one)) == {"image", "captioner"}  # captioning reads no text tower
    assert towers(moved(one, two)) >= {"image", "captioner", "text", "logit_scale"}
    assert "image" not in towers(moved(two, three))
    assert towers(moved(two, three)) >= {"captioner", "text"}


def test_moments_are_kept_or_fresh_as_the_stage_says(straight):
    kept, fresh = saved(straight, 14, "optimizer"), saved(straight, 18, "optimizer")
    steps = {name: int(value) for name, value in kept.items() if name.endswith(".step")}
    assert {count for name, count in steps.items() if name.startswith("model.captioner")} == {14}
    assert {count for name, count in steps.items() if name.startswith("model.text")} == {8}  # new in two
    assert not any(name.endswith(("exp_avg_sq", ".step")) for name in fresh)  # Lion keeps one moment
    assert not any(name.startswith("model.image") for name in fresh)


def test_stage_by_stage_in_commands_of_their_own(straight, tmp_path, capsys):
    out = tmp_path / "run"
    typo = ["--stages.two.trainable", "imgae.*", "0.5"]
    assert launch.main([*command(out, "--stage one"), *typo]) == launch.USER_ERROR
    assert "--stages.two.trainable 'imgae.*' matches no parameter: the nearest" in capsys.readouterr().err
    assert launch.main(command(out, "--stage two")) == launch.USER_ERROR
    said = capsys.readouterr().err
    assert said == (
        f"error: stage 'two' goes on from stage 'one', which is not finished in {out}: train that first, "
        "with --stage one, or name its --out\n"
    )
    for stage, end in ENDS.items():
        assert in_child(command(out, f"--stage {stage}")) == launch.DONE
        assert list(Ledger(out / "ledger").final()) == list(range(1, end + 1))
    assert_same(out, straight)
    reports = [each for each in jsonl.read(out / "metrics.jsonl") if "perf/seconds_left" in each]
    left = {each["step"]: each["perf/seconds_left"] for each in reports}
    assert [left[end] for end in ENDS.values()] == [0.0, 0.0, 0.0]  # to the end of what a command trains
    assert launch.main(command(out, "--stage one")) == launch.DONE
    assert f"stage one is finished in {out}; --stage two goes on with it" in capsys.readouterr().out
    assert launch.main(command(out)) == launch.DONE
    assert "is finished; a larger --stages.NAME.steps goes on" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "deaths",
    [
        [(5, "_advance"), (6, "_advance"), (7, "_advance")],  # about the end of a stage
        [(6, "report"), (14, "save"), (15, "_advance")],  # before and after the checkpoint at an end
        [(10, "_advance"), (11, "_advance"), (10, "report")],  # about another size
        [(4, "_advance"), (9, "_advance"), (12, "_advance"), (16, "_advance"), (17, "_advance")],
    ],
    ids=["end", "checkpoint", "size", "everywhere"],
)
def test_killed_across_stages_and_sizes_it_is_the_same_run(deaths, straight, tmp_path):
    out = tmp_path / "run"
    for step, after in deaths:
        code = in_child(command(out), dies_at=step, after=after)
        assert code == -signal.SIGKILL, (step, after)
    assert in_child(command(out)) == launch.DONE
    assert_same(out, straight)


def samples_of(out: Path) -> list[str]:
    return [line.split()[2] for line in Ledger(out / "ledger").final().values()]


def losses_of(out: Path) -> dict[int, float]:
    records = jsonl.read(out / "metrics.jsonl")
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def killed_on(ranks: list[int], deaths: list[int], out: Path, more: str) -> None:
    for world, step in zip(ranks, [*deaths, None], strict=True):
        code = in_child(command(out, more), ranks=world, dies_at=-1 if step is None else step)
        assert code == (launch.DONE if step is None else -signal.SIGKILL), (world, step)
    assert {each.ranks for each in read_starts(out / "starts.jsonl")} == set(ranks)


@pytest.mark.slow
def test_sharded_on_other_ranks_in_each_stage_it_is_the_same_run(straight, tmp_path):
    """At the end of a stage, at another size, and where Lion takes over from what AdamW kept."""
    out = tmp_path / "run"
    killed_on([2, 4, 1], [11, 14], out, "--parallel fsdp")
    assert samples_of(out) == samples_of(straight)
    assert losses_of(out) == pytest.approx(losses_of(straight), rel=1e-2)


@pytest.mark.slow
def test_elastic_on_other_ranks_in_each_stage_it_has_the_same_bits(tmp_path):
    straight, out = tmp_path / "straight", tmp_path / "run"
    elastic = "--deterministic elastic --stages.two.micro-batches 1"
    assert in_child(command(straight, elastic)) == launch.DONE
    killed_on([1, 4, 2], [6, 15], out, elastic)
    assert_same(out, straight, ranks=False)


def damage(out: Path, step: int) -> None:
    path = out / f"checkpoints/step-{step:08d}/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_where_the_end_of_a_stage_is_damaged_its_last_steps_are_done_again(straight, tmp_path, capsys):
    out = tmp_path / "run"
    assert in_child(command(out, "--stage one")) == launch.DONE
    damage(out, 6)
    assert launch.main(command(out, "--stage two")) == launch.USER_ERROR
    assert "goes on from stage 'one', which is not finished" in capsys.readouterr().err
    assert in_child(command(out)) == launch.DONE
    assert [(each.stage, each.step) for each in read_starts(out / "starts.jsonl")] == [
        ("one", 0), ("one", 3), ("two", 6), ("three", 14),
    ]  # fmt: skip
    assert_same(out, straight)


def test_a_stage_does_not_begin_without_what_the_one_before_has_trained(straight, tmp_path, capsys):
    out = tmp_path / "run"
    assert in_child(command(out, "--stage one")) == launch.DONE
    shutil.rmtree(out / "checkpoints")
    assert launch.main(command(out, "--stage two")) == launch.USER_ERROR
    assert "stage 'two' begins at step 6, and" in capsys.readouterr().err


def test_another_kind_of_optimizer_has_no_use_for_what_was_kept(tmp_path, capsys):
    out = tmp_path / "run"
    assert in_child(command(out, "--stage one")) == launch.DONE
    more = "--stage one --stages.one.steps 8 --stages.one.optim.kind lamb --allow-changed"
    more += " --stages.two.moments fresh"
    assert launch.main(command(out, more)) == launch.USER_ERROR
    assert "holds what adamw kept, of which --stages.one.optim.kind lamb" in capsys.readouterr().err


def test_a_stage_that_has_not_begun_may_be_changed(tmp_path, capsys):
    """Another rate or freeze for what comes next, after a day of what came before."""
    out = tmp_path / "run"
    assert in_child(command(out, "--stage one")) == launch.DONE
    more = "--stage two --stages.two.optim.lr 1e-4 --stages.three.trainable.image.* 0.5"
    assert in_child(command(out, more)) == launch.DONE
    *_, start = read_starts(out / "starts.jsonl")
    assert any("stages.two.optim.lr" in words for words in start.changed)
    assert launch.main(command(out, "--stage three --stages.one.optim.lr 1e-4")) == launch.USER_ERROR
    assert "belongs to another run, which differs in" in capsys.readouterr().err


def test_other_stages_than_those_behind_are_refused(straight, capsys):
    assert launch.main(command(straight, "--stages.one.steps 5 --stages.two.steps 9")) == launch.USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith(
        "error: the checkpoint of step 18 was trained through one (6 steps), two (8 steps)"
    )
    assert "these stages say one (5 steps), two (9 steps): give them their old names" in said
