import os
import signal
from pathlib import Path

import pytest
import yaml

from datasets.errors import UserError
from pretrain.rundir import RunDir, open_run, record

RUN = {"objectives": {"itc": {"kind": "itc"}}, "optim": {"lr": 0.002, "betas": [0.9, 0.98]}, "steps": 100}


def text(**changes):
    return yaml.safe_dump({**RUN, **changes}, sort_keys=False)


def test_first_use_writes_the_run_and_the_same_run_comes_back(tmp_path):
    out = tmp_path / "runs" / "itc"
    with open_run(out, text(), identity="a1") as run:
        assert yaml.safe_load(run.run_yaml.read_text()) == RUN
        stamp = run.run_yaml.stat().st_ino
        run.checkpoints.mkdir()
    with open_run(out, text(), identity="a1") as run:
        assert run.run_yaml.stat().st_ino == stamp
    with open_run(out, text(steps=200), identity="a1") as run:
        assert yaml.safe_load(run.run_yaml.read_text()) == RUN, "other budgets are the caller's to accept"
        record(run, text(steps=200), identity="a1")
        assert yaml.safe_load(run.run_yaml.read_text())["steps"] == 200
    assert sorted(p.name for p in out.iterdir()) == ["checkpoints", "lock", "run.yaml"]


def test_where_things_lie(tmp_path):
    run = RunDir(tmp_path)
    paths = (
        run.run_yaml, run.checkpoints, run.plots, run.metrics, run.ledger, run.tokenizer,
        run.manifests, run.quarantine,
    )  # fmt: skip
    assert [p.relative_to(tmp_path).as_posix() for p in paths] == [
        "run.yaml",
        "checkpoints",
        "plots",
        "metrics.jsonl",
        "ledger",
        "tokenizer.json",
        "manifests",
        "quarantine.jsonl",
    ]


def trained(folder, **changes):
    """The directory of a run that has taken a step."""
    with open_run(folder, text(**changes), identity="a1") as run:
        run.ledger.write_text("1 1 0000 0000 0000\n")


def test_what_a_mistake_left_is_taken_over(tmp_path):
    """Nothing was trained yet: the corrected command may have the directory."""
    with open_run(tmp_path, text(), identity="a1") as run:
        run.tokenizer.write_text("{}")
    with open_run(tmp_path, text(steps=3), identity="b2") as run:
        assert not run.tokenizer.exists()
        assert run.run_yaml.read_text().startswith("# identity: b2")
        run.ledger.write_text("1 1 0000 0000 0000\n")
    with pytest.raises(UserError, match="another run"):
        open_run(tmp_path, text(), identity="a1")


def test_another_run_is_refused_and_the_difference_named(tmp_path):
    trained(tmp_path)
    before = (tmp_path / "run.yaml").read_text()
    other = text(steps=7, optim={"lr": 0.003, "betas": [0.9, 0.98]}, model="tiny")
    with pytest.raises(UserError) as caught:
        open_run(tmp_path, other, identity="b2", budgets={"steps"})
    sentence = str(caught.value)
    assert "optim.lr (0.002 there, 0.003 here)" in sentence
    assert "model (nothing there, tiny here)" in sentence
    assert "betas" not in sentence
    assert "steps" not in sentence
    assert str(tmp_path) in sentence
    assert (tmp_path / "run.yaml").read_text() == before
    # A refusal holds no lock.
    open_run(tmp_path, text(), identity="a1").close()


def test_what_weights_do_not_hang_on_may_be_changed_on_purpose(tmp_path):
    trained(tmp_path)
    other = text(optim={"lr": 0.003, "betas": [0.9, 0.98]})
    with pytest.raises(UserError, match=r"optim\.lr .*, or go on in spite of it with --allow-changed"):
        open_run(tmp_path, other, identity="b2", changeable={"optim"})
    with open_run(tmp_path, other, identity="b2", changeable={"optim"}, allow_changed=True) as run:
        assert run.changed == ("optim.lr (0.002 there, 0.003 here)",)
        assert run.run_yaml.read_text().startswith("# identity: a1"), "the caller has yet to accept it"
        record(run, other, identity="b2")
    with open_run(tmp_path, other, identity="b2") as run:
        assert run.changed == ()


def test_what_weights_hang_on_is_refused_whatever_is_allowed(tmp_path):
    trained(tmp_path)
    other = text(optim={"lr": 0.003, "betas": [0.9, 0.98]}, model="tiny")
    with pytest.raises(UserError) as caught:
        open_run(tmp_path, other, identity="b2", changeable={"optim"}, allow_changed=True)
    assert "which differs in model (nothing there, tiny here): choose another --out" in str(caught.value)
    assert "allow-changed" not in str(caught.value)


def test_many_differences_are_counted_and_none_is_another_order(tmp_path):
    trained(tmp_path)
    with pytest.raises(UserError, match=r"a \(.*; b \(.*; c \(.*; and 2 more"):
        open_run(tmp_path, text(a=1, b=2, c=3, d=4, e=5), identity="b2")
    with pytest.raises(UserError, match="names its parts in another order: choose"):
        open_run(tmp_path, text(), identity="b2")


def test_a_directory_that_cannot_be_is_one_sentence(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        with pytest.raises(UserError, match=f"{out} cannot be written"):
            open_run(out, text(), identity="a1")


@pytest.fixture
def _nobody():
    """Root may write anywhere, so this test is somebody else."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)


@pytest.mark.usefixtures("_nobody")
def test_a_directory_without_permission_is_one_sentence():
    with pytest.raises(UserError, match="Permission denied"):
        open_run(Path("/medley-run"), text(), identity="a1")


def test_a_directory_of_unknown_origin_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"no run\.yaml"):
        open_run(tmp_path, text(), identity="a1")
    (tmp_path / "run.yaml").write_text("objectives: mine\n")
    with pytest.raises(UserError, match="not written by a run"):
        open_run(tmp_path, text(), identity="a1")


def test_two_processes_cannot_train_in_one_directory_and_kill_releases_it(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open_run(tmp_path, text(), identity="a1"):
                os.write(writer, b"!")
                signal.alarm(300)
                signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reader, 1) == b"!"
        with pytest.raises(UserError, match=f"in use by process {child} on "):
            open_run(tmp_path, text(), identity="a1")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with open_run(tmp_path, text(), identity="a1"):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_sources_that_come_go_or_change_places_are_named_as_a_whole(tmp_path):
    one, two = {"data": "a.tar", "classes": ""}, {"data": "b.tar", "classes": ""}
    trained(tmp_path, sources={"a": one, "b": two})
    known = {"identity": "b2", "changeable": {"sources"}}
    with pytest.raises(
        UserError, match=r"differs in the order of its sources \(a, b there\): .*--allow-changed"
    ):
        open_run(tmp_path, text(sources={"b": two, "a": one}), **known)
    with pytest.raises(
        UserError, match=r"differs in the source c, which is new; the source b, which is gone|gone; .*new"
    ):
        open_run(tmp_path, text(sources={"a": one, "c": two}), **known)
    with pytest.raises(UserError, match=r"sources\.a\.classes \('' there, names\.txt here\)"):
        open_run(tmp_path, text(sources={"a": {**one, "classes": "names.txt"}, "b": two}), **known)
    swapped = open_run(tmp_path, text(sources={"b": two, "a": one}), allow_changed=True, **known)
    assert swapped.changed == ("the order of its sources (a, b there)",)
    swapped.close()
