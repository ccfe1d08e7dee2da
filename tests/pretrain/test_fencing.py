"""A start that was thought dead writes nothing any more, once a later one of its job has the directory."""

import json
import os
from pathlib import Path

import pytest
import torch

from datasets.errors import UserError
from pretrain import checkpoint, fencing
from pretrain.fencing import FencedError, Records
from pretrain.ledger import Ledger
from pretrain.pieces import stage
from pretrain.place import Attempt, attempt_here
from pretrain.sinks.jsonl import JsonLines
from pretrain.starts import record_start


@pytest.fixture
def as_start(monkeypatch):
    """Makes this process a start of a job."""
    return lambda name: monkeypatch.setenv("MEDLEY_ATTEMPT", name)


@pytest.fixture
def taken(tmp_path, as_start):
    """A run directory that this process holds as the first start of job 7; left in the end."""
    as_start("7.0.1")
    lock, token = fencing.take(tmp_path)
    yield tmp_path
    fencing.leave(tmp_path, token)
    lock.close()


def take_over(out: Path) -> None:
    """What a process on another node does: here its token only takes the place of ours."""
    (out / "other").write_text(
        'process 99 on node9\n{"token": "ab", "job": "7", "restart": 1, "number": 1}\n'
    )
    (out / "other").replace(out / "lock")


def test_the_lock_says_who_holds_it_and_as_which_start(taken):
    process, said = (taken / "lock").read_text().splitlines()
    assert process == f"process {os.getpid()} on {os.uname().nodename}"
    said = json.loads(said)
    assert len(said.pop("token")) == 16
    assert said == {"job": "7", "restart": 0, "number": 1}


@pytest.mark.parametrize("later", ["7.0.2", "7.1.1", "7.1.0"])
def test_a_later_start_of_the_same_job_takes_over_and_the_earlier_one_is_fenced_off(taken, as_start, later):
    fencing.check(taken / "ledger")
    as_start(later)
    before = fencing._held[taken]
    lock, token = fencing.take(taken)
    fencing.check(taken / "ledger")
    fencing.hold(taken, before)  # as the process of the past sees it
    with pytest.raises(FencedError, match=f"taken over by process {os.getpid()} on"):
        fencing.check(taken / "ledger")
    fencing.hold(taken, token)
    lock.close()


@pytest.mark.parametrize("other", ["7.0.1", "7.0.0", "8.1.1"])
def test_nobody_else_takes_over(taken, as_start, other):
    as_start(other)
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on .*: wait for it, stop it"):
        fencing.take(taken)
    fencing.check(taken / "ledger")


def test_an_unnumbered_start_neither_takes_over_nor_is_taken_over(tmp_path, monkeypatch, as_start):
    monkeypatch.delenv("MEDLEY_ATTEMPT", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    lock, token = fencing.take(tmp_path)
    as_start("7.5.1")
    with pytest.raises(UserError, match="is in use by process"):
        fencing.take(tmp_path)
    fencing.leave(tmp_path, token)
    lock.close()


def test_what_was_left_is_taken_by_anybody(tmp_path, as_start):
    for name in ("7.3.1", "8.0.1", "7.0.1"):
        as_start(name)
        lock, token = fencing.take(tmp_path)
        fencing.check(tmp_path)
        fencing.leave(tmp_path, token)
        lock.close()
    fencing.check(tmp_path)  # nothing is held: anybody may write


WRITERS = {
    "a step in the ledger": lambda out: Ledger(out / "ledger").record(1, ["a"], loss=1.0, norm=1.0),
    "metrics": lambda out: JsonLines(out / "metrics.jsonl").step(1, {"loss": 1.0}),
    "a start": lambda out: record_start(
        out / "starts.jsonl", step=0, stage="one", done=0, ranks=1, device="cpu"
    ),
    "a small file": lambda out: fencing.replace(out / "run.yaml", b"x"),
    "a checkpoint": lambda out: checkpoint.save(out / "checkpoints", 1, {"model": {}}, {}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_who_is_fenced_off_writes_nothing(taken, write):
    take_over(taken)
    before = sorted(path for path in taken.rglob("*") if path.is_file() and path.stat().st_size)
    with pytest.raises(FencedError):
        write(taken)
    assert sorted(path for path in taken.rglob("*") if path.is_file() and path.stat().st_size) == before
    assert not (taken / "checkpoints").exists()


def test_a_checkpoint_that_was_begun_before_is_not_published(taken):
    folder = taken / "checkpoints"
    beside = checkpoint.begin(folder, 5)
    assert beside is not None
    tensors = {"model": stage({"w": torch.ones(2)}, zero=True)}
    files = checkpoint.write_part(beside, tensors, rank=0, state={})
    take_over(taken)
    with pytest.raises(FencedError):
        checkpoint.commit(beside, files)
    with pytest.raises(FencedError):
        checkpoint.prune(folder, keep=2)
    assert checkpoint.find(folder, report=print) is None


def test_a_lock_that_somebody_removed_fences_off_too(taken):
    (taken / "lock").unlink()
    with pytest.raises(FencedError, match="was taken over: process"):
        fencing.check(taken)


def test_what_lies_elsewhere_is_nobodys_to_forbid(taken, tmp_path_factory):
    take_over(taken)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with Records(elsewhere / "lines") as file:
        file.write(b"line\n")
    assert (elsewhere / "lines").read_bytes() == b"line\n"


def test_a_supervisor_sees_that_a_later_start_of_its_job_has_the_directory(tmp_path, as_start):
    as_start("7.0.1")
    assert not fencing.is_taken_over(tmp_path)
    take_over(tmp_path)
    assert fencing.is_taken_over(tmp_path)
    as_start("7.1.1")
    assert not fencing.is_taken_over(tmp_path)


def test_where_an_attempt_comes_from():
    assert attempt_here({}) is None
    assert attempt_here({"SLURM_JOB_ID": "7"}) == Attempt(job="7", restart=0, number=0)
    requeued = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "MEDLEY_ATTEMPT": "7.2.3"}
    assert attempt_here(requeued) == Attempt(job="7", restart=2, number=3)
    assert str(attempt_here(requeued)) == "7.2.3"
