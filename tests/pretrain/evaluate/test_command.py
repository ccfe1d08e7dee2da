"""`python -m pretrain.evaluate` on a run of a few steps, alone and on two ranks."""

import json
import os
import subprocess
import sys

import pytest
import torch

from pretrain import checkpoint, launch
from pretrain.evaluate import __main__ as command
from pretrain.evaluate.subject import load_subject
from pretrain.ledger import Ledger

TINY = (
    "--objectives itc,lm --stages.one.batch 8 --stages.one.resolution 32 --vocabulary 300 --model.embed 16 "
    "--model.text.width 16 --model.text.layers 1 --model.captioner.width 16 --cadence.checkpoint 2 "
    "--loader-threads 1 --precision.threads 1 --stages.one.steps 4"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_shard):
    def beside(place, colour):
        return {"captions": [f"a {colour} square", f"number {place}"], "class": colour}

    return write_shard(tmp_path_factory.mktemp("data") / "a.tar", 20, beside=beside, damaged=(3,))


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A run that was judged at steps 2 and 4 while it trained."""
    out = tmp_path_factory.mktemp("run") / "run"
    arguments = f"{TINY} --data {data} --val {data} --eval.every 2 --eval.limit 8 --out {out}"
    assert launch.main(arguments.split()) == launch.DONE
    return out


def files(run):
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if "evaluations" not in path.parts}


def test_the_last_evaluation_of_training_is_that_of_the_command(run, data, capsys):
    before = files(run)
    assert command.main([str(run)]) == 0
    assert files(run) == before, "a run is only read"
    said = capsys.readouterr().out
    assert f"{run} at step 4 on {data}" in said
    assert "1 samples of" in said
    (kept,) = [path for path in (run / "evaluations").glob("*.json") if path.name != "val.json"]
    found = json.loads(kept.read_text())
    assert (found["step"], found["data"]) == (4, data)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {f"eval/{name}" for name in found["values"]} == {name for name in last if name.startswith("eval/")}
    for name, each in found["values"].items():
        assert last[f"eval/{name}"] == pytest.approx(each["value"], rel=1e-6), name
        assert f"{name} " in said
    kept.unlink()


@pytest.mark.slow
def test_two_ranks_find_the_same(run, data, tmp_path):
    for world in (1, 2):
        program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        # Small batches, so that both ranks have some.
        arguments = [str(run), "--batch", "4", "--json", str(tmp_path / f"{world}.json")]
        result = subprocess.run(
            [sys.executable, *program, "-m", "pretrain.evaluate", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("zero_shot_top1") == 1
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()


def test_what_it_measures_can_be_chosen(run, data, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\nyellow\na {} square\n")
    out = tmp_path / "found" / "x.json"
    arguments = ["--measures", "zero_shot", "nearest_neighbours", "--classes", str(tmp_path / "classes.txt")]
    more = ["--train", data, "--step", "2", "--limit", "9", "--json", str(out)]
    assert command.main([str(run), *arguments, *more]) == 0
    found = json.loads(out.read_text())
    assert found["step"] == 2
    assert {name: each["chance"] for name, each in found["values"].items()} == {
        "zero_shot_top1": 0.25,
        "nearest_neighbours": 0.25,
    }


def test_evaluation_changes_no_bit_of_the_training(run, data, tmp_path):
    out = tmp_path / "run"
    assert launch.main(f"{TINY} --data {data} --out {out}".split()) == launch.DONE
    lines = [Ledger(each / "ledger").final() for each in (run, out)]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 4
    weights = [each / "checkpoints" / "step-00000004" / "model.safetensors" for each in (run, out)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_files_that_cannot_be_written_are_a_warning(tmp_path, data, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "samples").write_text("a file where a directory should be")
    arguments = f"{TINY} --data {data} --val {data} --eval.every 2 --eval.limit 8 --out {out}"
    assert launch.main(arguments.split()) == launch.DONE
    assert "warning: no sample sheet of step 2" in capsys.readouterr().out
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in records if "eval/zero_shot_top1" in each] == [2, 4]


def test_a_run_judged_on_nothing_asks_for_data(tmp_path, data, capsys):
    out = tmp_path / "run"
    assert launch.main(f"{TINY} --stages.one.steps 2 --data {data} --out {out}".split()) == launch.DONE
    assert command.main([str(out)]) == 2
    assert "was not evaluated in training: name data by --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("/nowhere", "neither a run directory (no run.yaml) nor an export"),
        ("RUN --step 3", "has no checkpoint of step 3 that verifies (of steps there: 2, 4)"),
        ("RUN --data /nowhere/*.tar", "/nowhere"),
        ("RUN --classes /nowhere.txt", "there is no class file /nowhere.txt"),
        ("RUN --classes imagenet", "has the label 'red', which is none of the 1000 classes of imagenet"),
        ("RUN --measures linear_probe", "name them by --train"),
        ("RUN --json /proc/nothing/x.json", "the results cannot be written to /proc/nothing/x.json"),
        ("RUN --data scenes --train x.tar", "scenes have their own measures"),
        ("RUN --rerank 32", "--rerank 32 needs a model that was trained to tell matching pairs from others"),
        ("RUN --limit -1", "--limit is -1; it must be at least 0"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(run, capsys, arguments, sentence):
    assert command.main(arguments.replace("RUN", str(run)).split()) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_damaged_checkpoint_is_passed_over_and_left_alone(run, tmp_path):
    newest = run / "checkpoints" / "step-00000004" / "model.safetensors"
    content = newest.read_bytes()
    try:
        newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert load_subject(run).step == 2
        assert newest.parent.is_dir()
    finally:
        newest.write_bytes(content)
    subject = load_subject(run)
    assert (subject.step, subject.resolution) == (4, 32)
    saved = checkpoint.chosen(run / "checkpoints").load().tensors["model"]
    for name, parameter in subject.model.named_parameters():
        assert torch.equal(parameter, saved[f"model.{name}"])


def test_an_evaluation_that_cannot_be_is_refused_before_training(tmp_path, data, capsys):
    arguments = f"{TINY} --data {data} --val {data} --out {tmp_path / 'run'} --eval.classes /nowhere.txt"
    assert launch.main(arguments.split()) == launch.USER_ERROR
    assert "there is no class file /nowhere.txt" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
