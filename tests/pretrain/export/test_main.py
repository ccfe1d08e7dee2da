"""The command: what it writes, what it leaves alone, and what it says of mistakes in one sentence."""

import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pretrain.evaluate.subject import load_subject
from pretrain.export import __main__ as command
from pretrain.export import to_open_clip


def run_command(*arguments):
    return command.main([str(each) for each in arguments])


def said(capsys, *arguments):
    """The sentence on the error stream, for a command line that ends with code 2."""
    assert run_command(*arguments) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: ")
    assert sentence.count("\n") == 1
    return sentence


def everything(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


def test_it_writes_what_it_says_and_only_reads_the_run(make_run, tmp_path, capsys):
    run = make_run("clip")
    unfinished = run / "checkpoints" / "step-00000009.tmp-77"
    unfinished.mkdir()  # a run that is saving at this moment
    before = everything(run)
    assert run_command(run, "--to", "open_clip", tmp_path / "new" / "out") == 0
    assert "open_clip says of it what the run says" in capsys.readouterr().out
    assert everything(run) == before
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {
        "open_clip_config.json", "open_clip_model.safetensors", "README.md",
    }  # fmt: skip
    assert len({path.stat().st_mode for path in (tmp_path / "new" / "out").iterdir()}) == 1
    (tmp_path / "empty").mkdir()
    assert run_command(run, tmp_path / "empty", "--to", "transformers") == 0
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json", "README.md",
    }  # fmt: skip
    assert not [path for path in tmp_path.rglob("*.tmp-*") if path != unfinished]


def test_a_step_can_be_chosen(make_run, tmp_path, capsys):
    run = make_run("clip")
    shutil.copytree(run, tmp_path / "copy")
    sentence = said(capsys, run, "--to", "open_clip", tmp_path / "out", "--step", 7)
    assert "no checkpoint of step 7 that verifies (of steps there: 2)" in sentence
    assert run_command(run, "--to", "open_clip", tmp_path / "out", "--step", 2) == 0
    assert "Step 2: 16 samples seen" in (tmp_path / "out" / "README.md").read_text()


def test_mistakes(make_run, tmp_path, capsys):
    run, out = make_run("clip"), tmp_path / "out"
    assert "neither a run directory" in said(capsys, tmp_path, "--to", "open_clip", out)
    assert "is there already" in said(capsys, run, "--to", "open_clip", run)
    assert "is there already" in said(capsys, run, "--to", "open_clip", run / "run.yaml")
    assert "cannot be written" in said(capsys, run, "--to", "open_clip", "/proc/nothing/out")
    assert not out.exists()
    assert run_command(run, "--to", "open_clip", out) == 0
    capsys.readouterr()
    assert "is an export already" in said(capsys, out, "--to", "transformers", tmp_path / "again")
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint yet" in said(capsys, run, "--to", "open_clip", tmp_path / "none")


@pytest.mark.parametrize(
    ("to", "key"),
    [
        ("open_clip", "visual.proj"), ("open_clip", "text_projection"), ("open_clip", "logit_scale"),
        ("transformers", "visual_projection.weight"), ("transformers", "text_projection.weight"),
    ],
)  # fmt: skip
def test_an_export_that_says_something_else_is_not_kept(make_run, tmp_path, capsys, monkeypatch, to, key):
    run, (write, read) = make_run("clip"), command.SIDES[to]

    def write_wrongly(subject, folder):
        notes = write(subject, folder)
        (path,) = folder.glob("*.safetensors")
        state = load_file(path)
        state[key] += 1e-3
        save_file(state, path, metadata={"format": "pt"})
        return notes

    monkeypatch.setitem(command.SIDES, to, (write_wrongly, read))
    assert "that differ from the run's by" in said(capsys, run, "--to", to, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "clip.json"}


def test_a_full_disk(make_run, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    run = make_run("clip")
    monkeypatch.setattr(to_open_clip, "save_file", full)
    assert "No space left on device): choose another OUT" in said(
        capsys, run, "--to", "open_clip", tmp_path / "out"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"run", "clip.json"}


def test_a_kill_in_the_middle_leaves_no_directory_of_that_name(make_run, tmp_path, monkeypatch):
    run, out = make_run("clip"), tmp_path / "out"
    monkeypatch.setattr(command, "prove", lambda *_: os._exit(9))
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        run_command(run, "--to", "open_clip", out)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not out.exists()
    monkeypatch.undo()
    assert run_command(run, "--to", "open_clip", out) == 0
    assert load_subject(out).run is None
