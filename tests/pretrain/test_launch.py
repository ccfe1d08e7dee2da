"""The program as a user runs it: train, stop, be killed, go on, and make mistakes."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from datasets import sources
from datasets.errors import UserError
from datasets.scenes import Scenes
from objectives.base import Pass
from objectives.lm import LM
from pretrain import checkpoint, launch, loop
from pretrain.evaluate import during, sheet
from pretrain.evaluate.observe import StoppedError
from pretrain.evaluate.results import Result
from pretrain.evaluate.sheet import Sheet
from pretrain.ledger import Ledger
from pretrain.sinks import jsonl
from pretrain.starts import read_starts

TINY = (
    "--stages.one.batch 8 --stages.one.resolution 32 --stages.one.optim.warmup 2 --vocabulary 300 "
    "--model.embed 16 --model.text.width 16 --model.text.layers 1 --model.captioner.width 16 "
    "--model.captioner.layers 1 --cadence.report 2 --cadence.checkpoint 3 --loader-threads 1"
)
STEPS = 14
METRICS = {
    "time", "samples", "train/loss", "train/loss/itc", "train/loss/lm", "train/itc/accuracy", "train/lr",
    "model/gradient_norm", "model/gradient_norm/image", "model/gradient_norm/text",
    "model/gradient_norm/captioner", "model/gradient_norm/objectives", "model/logit_scale",
    "perf/samples_per_second", "perf/data_wait", "perf/step_seconds_p99", "perf/memory_gib",
    "perf/restarts", "perf/lost_steps", "data/masked",
}  # fmt: skip


def command(out: Path, more: str = "") -> list[str]:
    return f"--objectives itc,lm --stages.one.steps {STEPS} {TINY} --out {out} {more}".split()


def final_model(out: Path) -> bytes:
    return (out / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").read_bytes()


@pytest.fixture(autouse=True, scope="module")
def _no_evaluation():
    """The end of a run is judged elsewhere; here it would take longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(during, "_examine", lambda training: {"nothing": Result(value=0.0)})
        patch.setattr(during, "make_sheet", lambda *_, **__: Sheet(rows=(), said_by="captioner"))
        patch.setattr(sheet, "_draw", lambda *_, **__: None)
        patch.setattr(launch, "show", lambda training: None)
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert in_child(command(out)) == launch.DONE
    return out


def in_child(arguments: list[str], kill_after: float | None = None) -> int:
    """Run in a fork of this process, which has imported everything already; -9 if it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            torch.set_num_threads(1)
            code = launch.main(arguments)
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_run_leaves_what_the_readme_says(straight):
    assert {path.name for path in straight.iterdir()} >= {
        "run.yaml", "metrics.jsonl", "ledger", "checkpoints", "tokenizer.json",
    }  # fmt: skip
    records = list(jsonl.read(straight / "metrics.jsonl"))
    assert [record["step"] for record in records] == [2, 3, 4, 6, 8, 9, 10, 12, 14, 14]
    assert set(records[0]) >= METRICS
    assert records[-1]["eval/nothing"] == 0.0
    assert list(Ledger(straight / "ledger").final()) == list(range(1, STEPS + 1))
    assert {path.name for path in (straight / "checkpoints").iterdir()} == {
        "step-00000012", "step-00000014",
    }  # fmt: skip


def test_evaluations_come_when_they_are_due_and_one_that_was_cut_short_is_made_up_for(tmp_path, monkeypatch):
    """Killed inside the evaluation of step 10, the run goes on with that evaluation."""
    out, judged = tmp_path / "run", []

    def examine(training):
        step = training.standing.step
        judged.append(step)
        if step == 10 and judged.count(10) == 1:
            raise KeyboardInterrupt
        return {"step": Result(value=float(step))}

    monkeypatch.setattr(during, "_examine", examine)
    with pytest.raises(KeyboardInterrupt):
        launch.main(command(out, "--eval.every 5"))
    assert launch.main(command(out, "--eval.every 5")) == launch.DONE
    assert judged == [5, 10, 10, 14]
    records = list(jsonl.read(out / "metrics.jsonl"))
    found = [(record["step"], record["eval/step"]) for record in records if "eval/step" in record]
    assert found == [(5, 5.0), (10, 10.0), (14, 14.0)]
    assert [record["step"] for record in records if "finished" in record] == [14]
    assert sorted(path.name for path in (out / "samples").glob("*.json")) == [
        "step-00000005.json", "step-00000010.json", "step-00000014.json",
    ]  # fmt: skip
    assert [each.step for each in read_starts(out / "starts.jsonl")] == [0, 10]


def test_a_signal_ends_an_evaluation_which_is_made_at_the_next_start(tmp_path, monkeypatch):
    """Also that after the last step."""
    out, judged = tmp_path / "run", []

    def examine(training):
        judged.append(training.standing.step)
        if judged.count(judged[-1]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if training.asked():
            raise StoppedError
        return {"step": Result(value=1.0)}

    monkeypatch.setattr(during, "_examine", examine)
    codes = [launch.main(command(out, "--eval.every 10")) for _ in range(3)]
    assert codes == [launch.INTERRUPTED, launch.INTERRUPTED, launch.DONE]
    assert judged == [10, 10, 14, 14]


def test_an_evaluation_that_fails_halfway_is_a_warning_and_at_the_end_an_error(tmp_path, capsys, monkeypatch):
    def examine(training):
        raise UserError("its labels are none of the classes")

    monkeypatch.setattr(during, "_examine", examine)
    assert launch.main(command(tmp_path / "run", "--eval.every 5")) == launch.USER_ERROR
    said = capsys.readouterr()
    assert "warning: step 5 is not judged: its labels" in said.out
    assert said.err == "error: its labels are none of the classes\n"
    monkeypatch.setattr(during, "_examine", lambda training: {"nothing": Result(value=0.0)})
    assert launch.main(command(tmp_path / "run")) == launch.DONE


def test_the_same_command_twice_says_it_is_finished(straight, capsys):
    assert launch.main(command(straight)) == launch.DONE
    assert "is finished" in capsys.readouterr().out


def test_run_yaml_repeats_the_run_to_the_bit(straight, tmp_path):
    assert in_child(["--recipe", str(straight / "run.yaml"), "--out", str(tmp_path / "again")]) == launch.DONE
    assert final_model(tmp_path / "again") == final_model(straight)


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_run_ends_in_the_same_bits(straight, tmp_path):
    """Each time with kill -9, wherever it is, and then the same command again."""
    out, moments = tmp_path / "run", random.Random(0)
    killed = 0
    while killed < 10:
        begun = time.monotonic()
        code = in_child(command(out), kill_after=moments.uniform(0.05, 0.6))
        killed += code == -signal.SIGKILL
        if code == launch.DONE:  # it was too fast: once more from the start
            assert final_model(out) == final_model(straight)
            out = tmp_path / f"run-{begun}"
    assert in_child(command(out)) == launch.DONE
    assert final_model(out) == final_model(straight)
    assert Ledger(out / "ledger").final() == Ledger(straight / "ledger").final()


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_inside_a_save_the_run_ends_in_the_same_bits(straight, tmp_path, monkeypatch, moment):
    out, real, calls = tmp_path / "run", os.fsync, 0

    def die(*arguments):
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    if moment == "fsync":
        monkeypatch.setattr(checkpoint.os, "fsync", die)
    else:
        monkeypatch.setattr(Path, "replace", lambda self, target: os.kill(os.getpid(), signal.SIGKILL))
    assert in_child(command(out)) == -signal.SIGKILL
    monkeypatch.undo()
    assert in_child(command(out)) == launch.DONE
    assert final_model(out) == final_model(straight)


def full_at(monkeypatch, *steps: int) -> None:
    """There is no room for the checkpoints of these steps."""
    real = checkpoint.write_part

    def write_part(beside, *arguments, **named):
        if beside.name.startswith(tuple(f"step-{step:08d}" for step in steps)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(beside, *arguments, **named)

    monkeypatch.setattr(checkpoint, "write_part", write_part)


def test_a_disk_that_is_full_for_a_while_costs_no_step(straight, tmp_path, monkeypatch, capsys):
    full_at(monkeypatch, 6, 9)
    assert launch.main(command(tmp_path / "run")) == launch.DONE
    said = capsys.readouterr().out
    for step in (6, 9):
        assert f"warning: no checkpoint of step {step} could be written" in said
    assert said.count("No space left on device") == 2
    assert final_model(tmp_path / "run") == final_model(straight)
    assert Ledger(tmp_path / "run" / "ledger").final() == Ledger(straight / "ledger").final()
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


def test_a_run_whose_end_cannot_be_saved_says_so_and_may_be_ended_later(
    straight, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        full_at(patch, STEPS)
        assert launch.main(command(tmp_path / "run")) == launch.USER_ERROR
    said = capsys.readouterr()
    assert f"error: no checkpoint of step {STEPS} could be written in {tmp_path}" in said.err
    assert said.err.count("\n") == 1
    assert "warning" not in said.out
    assert launch.main(command(tmp_path / "run")) == launch.DONE
    assert final_model(tmp_path / "run") == final_model(straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(straight, tmp_path, monkeypatch, capsys, number):
    out, real = tmp_path / "run", loop.train_step

    def signalled(*arguments, **named):
        if named["key"][1] == 7:
            os.kill(os.getpid(), number)
        return real(*arguments, **named)

    monkeypatch.setattr(loop, "train_step", signalled)
    assert launch.main(command(out)) == launch.INTERRUPTED
    said = capsys.readouterr().out
    assert f"{number.name} asked to stop: step 8 is saved" in said
    assert "the same command goes on from there" in said
    monkeypatch.setattr(loop, "train_step", real)
    assert launch.main(command(out)) == launch.DONE
    assert "from step 8" in capsys.readouterr().out
    assert final_model(out) == final_model(straight)


@pytest.mark.slow
def test_two_ranks_see_the_samples_of_one_and_go_on_where_they_stopped(straight, tmp_path):
    """Under torchrun: the same ordered samples per step, the same losses but for rounding."""
    out = tmp_path / "run"
    program = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "pretrain.launch",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for steps in (9, STEPS):  # the second start goes on from a checkpoint
        arguments = [*command(out), "--stages.one.steps", str(steps)]
        result = subprocess.run(
            [sys.executable, *program, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert result.returncode == 0, result.stderr
    assert "from step 9" in result.stdout
    lines = {rank: Ledger(path / "ledger").final() for rank, path in ((1, straight), (2, out))}
    for step in range(1, STEPS + 1):
        one, two = lines[1][step].split(), lines[2][step].split()
        assert one[2] == two[2], "the samples"
        assert (one[1], two[1]) == ("1", "2"), "the ranks"
    losses = [
        [record.get("train/loss") for record in jsonl.read(path / "metrics.jsonl")]
        for path in (straight, out)
    ]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-3)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(straight, tmp_path, capsys, monkeypatch):
    out, real = tmp_path / "run", loop.train_step

    def interrupted(*arguments, **named):
        if named["key"][1] == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **named)

    monkeypatch.setattr(loop, "train_step", interrupted)
    assert launch.main(command(out)) == launch.INTERRUPTED
    monkeypatch.setattr(loop, "train_step", real)
    newest = out / "checkpoints" / "step-00000008" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    assert launch.main(command(out)) == launch.DONE
    said = capsys.readouterr().out
    assert "checkpoint step-00000008 is damaged" in said
    assert "from step 6" in said
    assert final_model(out) == final_model(straight)


def test_a_run_without_anything_to_judge_ends_well(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(during, "_examine", lambda training: {})
    for _ in range(2):
        assert launch.main(command(tmp_path / "run", "--stages.one.steps 2")) == launch.DONE
    said = capsys.readouterr().out
    assert "nothing to evaluate on: name data by --val" in said
    assert "is finished" in said


def test_too_little_data_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    scenes = Scenes(size=5)
    monkeypatch.setattr(sources, "open_source", lambda *_, **__: scenes)
    assert launch.main(command(tmp_path / "run")) == launch.USER_ERROR
    assert "scenes has 5 samples, too few for one batch that takes 8" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_refused_budget_leaves_run_yaml_as_it_was(straight, capsys):
    before = (straight / "run.yaml").read_text()
    assert launch.main(command(straight, "--stages.one.steps 3")) == launch.USER_ERROR
    assert "does not fit these stages" in capsys.readouterr().err
    assert (straight / "run.yaml").read_text() == before


def test_another_run_is_refused_and_the_difference_named(straight, capsys):
    assert launch.main(command(straight, "--seed 5")) == launch.USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "belongs to another run, which differs in seed (0 there, 5 here)" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--data /nowhere/*.tar", "/nowhere"),
        ("--data /dev/null", "/dev/null"),
        ("--model.image timm:vit_tiny_patch16_22", "did you mean"),
        ("--model.image resnet", "write small, timm:NAME or open_clip:NAME"),
        ("--model.text.heads 3", "heads"),
        ("--out /proc/nothing", "cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(tmp_path, capsys, more, sentence):
    assert launch.main(command(tmp_path / "run", more)) == launch.USER_ERROR
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_an_objective_that_the_source_or_the_model_cannot_serve_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(LM, "needs", frozenset({"image", "text", "sound"}))
    assert launch.main(command(tmp_path / "a")) == launch.USER_ERROR
    assert "objective 'lm' needs sound, which scenes does not give as captions" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(LM, "passes", (Pass("image_tokens", image="masked", text="none"),))
    assert launch.main(command(tmp_path / "b")) == launch.USER_ERROR
    assert "which this model cannot give" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path, capsys, monkeypatch):
    assert launch.main(command(tmp_path / "run", "--stages.one.optim.lr 1e30")) == launch.USER_ERROR
    assert "try a lower --stages.one.optim.lr" in capsys.readouterr().err
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        assert json.loads((path / "state.json").read_text())["step"] < 6
