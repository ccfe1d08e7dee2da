"""A checkpoint is written beside training: at most one, all or nothing, and its failure is soon known."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from pretrain import checkpoint
from pretrain.distributed import Ranks
from pretrain.flight import Saver

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
PATIENCE = 120.0
"""Seconds within which whatever is waited for comes, on any machine."""


class Slow:
    """A disk on which one file waits until it may go on, or that is full."""

    def __init__(self, monkeypatch, *, full: bool = False) -> None:
        self.may, self.asked, self.full = threading.Event(), threading.Event(), full
        real = os.fsync

        def fsync(descriptor):
            self.asked.set()
            assert self.may.wait(PATIENCE)
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        if full:
            self.may.set()


def saver(folder: Path, ranks: Ranks = ALONE, *, keep_every: int = 0) -> tuple[Saver, list[str]]:
    said: list[str] = []
    return Saver(ranks, folder, keep=2, keep_every=keep_every, note=said.append), said


def begin(to: Saver, step: int, value: float | None = None, *, last: bool = False) -> torch.Tensor:
    """Save one tensor, which is given back."""
    tensor = torch.full((1000,), float(step) if value is None else value)
    to.begin(step, lambda: {"model": {"w": tensor}}, {"step": step}, last=last)
    return tensor


def boundary(to: Saver) -> None:
    """What the loop does at the beginning of a step, on one rank."""
    to.settle(to.asks())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_training_goes_on_while_it_is_written_and_what_it_changes_is_not_saved(tmp_path, monkeypatch):
    disk, (to, said) = Slow(monkeypatch), saver(tmp_path)
    tensor = begin(to, 1)
    assert disk.asked.wait(PATIENCE)
    for _ in range(3):
        boundary(to)
        tensor += 1
    assert all(".tmp-" in name for name in names(tmp_path)), "published before it was written"
    disk.may.set()
    assert to.finish() is None
    assert names(tmp_path) == ["step-00000001"]
    saved = checkpoint.chosen(tmp_path).load()
    assert torch.equal(saved.tensors["model"]["w"], torch.ones(1000))
    assert saved.state == {"step": 1}
    assert said == []


def test_one_is_finished_before_the_next_is_begun(tmp_path, monkeypatch):
    disk, (to, _) = Slow(monkeypatch), saver(tmp_path)
    begin(to, 1)
    threading.Timer(0.2, disk.may.set).start()
    begin(to, 2)
    assert "step-00000001" in names(tmp_path)
    assert to.finish() is None
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_full_disk_is_said_at_the_next_step_and_the_next_save_commits(tmp_path, monkeypatch):
    to, said = saver(tmp_path)
    begin(to, 1)
    to.finish()
    with monkeypatch.context() as patch:
        Slow(patch, full=True)
        begin(to, 2)
        assert to._flight is not None
        to._flight.files.exception(PATIENCE)  # the thread is done
        boundary(to)
    (sentence,) = said
    assert f"warning: no checkpoint of step 2 could be written in {tmp_path} (No space left" in sentence
    assert sentence.endswith("the earlier ones are untouched, and training goes on")
    assert names(tmp_path) == ["step-00000001"]
    begin(to, 3)
    assert to.finish() is None
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_the_last_one_must_succeed(tmp_path, monkeypatch):
    Slow(monkeypatch, full=True)
    to, said = saver(tmp_path)
    begin(to, 2, last=True)
    failure = to.finish()
    assert failure is not None
    assert "make room there or choose another --out" in failure
    assert said == []
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["mkdir", "replace"])
def test_what_rank_zero_cannot_do_is_said_too(tmp_path, monkeypatch, call):
    to, said = saver(tmp_path)

    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, refuse)
        begin(to, 1)
        to.finish()
    assert "(Read-only file system)" in said[0]
    assert names(tmp_path) == []


def test_a_mistake_in_the_thread_is_no_full_disk(tmp_path):
    to, said = saver(tmp_path)
    to.begin(1, lambda: {"model": {"w": torch.zeros(1, dtype=torch.complex64)}}, {})
    with pytest.raises(KeyError):
        to.finish()
    assert said == []


def test_the_same_step_is_written_once(tmp_path, monkeypatch):
    to, _ = saver(tmp_path)
    begin(to, 1)
    to.finish()
    monkeypatch.setattr(checkpoint, "begin", None)
    begin(to, 1)
    assert to.finish() is None


def test_a_start_takes_up_what_stands_there(tmp_path):
    to, _ = saver(tmp_path)
    begin(to, 1)
    to.finish()
    other, _ = saver(tmp_path)
    begin(other, 1, value=7.0)
    assert other.finish() is None
    assert float(checkpoint.chosen(tmp_path).load().tensors["model"]["w"][0]) == 1.0


def test_what_is_left_in_flight_is_no_checkpoint_and_removed_by_the_next(tmp_path, monkeypatch):
    disk, (to, _) = Slow(monkeypatch), saver(tmp_path)
    begin(to, 1)
    assert disk.asked.wait(PATIENCE)
    threading.Timer(0.2, disk.may.set).start()
    to.close()
    assert all(".tmp-" in name for name in names(tmp_path))
    assert checkpoint.find(tmp_path, report=print) is None
    assert names(tmp_path) == []


def test_the_last_ones_and_every_nth_are_kept(tmp_path):
    to, said = saver(tmp_path, keep_every=4)
    for step in range(1, 12):
        begin(to, step)
    to.finish()
    assert names(tmp_path) == [f"step-{step:08d}" for step in (4, 8, 10, 11)]
    assert said == []


def test_old_ones_that_cannot_be_removed_are_no_reason_to_stop(tmp_path, monkeypatch):
    to, said = saver(tmp_path)

    def refuse(path, **_):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    for step in (1, 2, 3):
        begin(to, step)
    assert to.finish() is None
    assert said == [f"warning: old checkpoints in {tmp_path} cannot be removed (Device or resource busy)"]


def on_ranks(ranks: Ranks, *, folder: Path, faulty: int):
    """Two saves; in the first, one rank's disk is full. What was said, and what stands there after each."""
    to, said = saver(folder, ranks)
    seen = []
    for step in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            if step == 1 and ranks.rank == faulty:
                Slow(patch, full=True)
            begin_shared(to, ranks, step)
            while to._flight is not None:
                asked = to.asks()
                sums = ranks.sum(torch.tensor(list(asked.values())))
                to.settle(dict(zip(asked, sums.tolist(), strict=True)))
                time.sleep(0.001)
        ranks.wait()
        seen.append(names(folder))
        ranks.wait()
    to.finish()
    to.close()
    return said, seen


def begin_shared(to: Saver, ranks: Ranks, step: int) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    assert ranks.group is not None
    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    whole = distribute_tensor(torch.arange(10.0) + step, mesh, [Shard(0)], src_data_rank=None)
    to.begin(step, lambda: {"model": {"w": whole}}, {"step": step})


@pytest.mark.parametrize("world", [2, 4])
def test_when_one_rank_cannot_write_none_has_and_the_next_save_commits(pool, tmp_path, world):
    faulty = world - 1
    for said, seen in pool.run(on_ranks, world, folder=tmp_path, faulty=faulty):
        assert f"(rank {faulty}: No space left on device)" in said[0]
        assert len(said) == 1
        assert seen == [[], ["step-00000002"]]
    parts = [f"model-{rank:05d}.safetensors" for rank in range(world)]
    assert names(tmp_path / "step-00000002") == ["manifest.json", *parts, "state.json"]
    saved = checkpoint.chosen(tmp_path).load()
    assert torch.equal(saved.tensors["model"]["w"], torch.arange(10.0) + 2)


def hidden(ranks: Ranks, *, folder: Path):
    """Each rank writes on a disk of its own, as with --out on a machine's own disk."""
    to, _ = saver(folder, ranks)
    real = checkpoint.write_part

    def elsewhere(beside, *arguments, **named):
        own = folder / f"rank{ranks.rank}"
        own.mkdir()
        return real(own if ranks.rank else beside, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_part", elsewhere)
        begin_shared(to, ranks, 1)
        failure = to.finish()
    to.close()
    return failure


def test_ranks_that_do_not_share_a_disk_are_told(pool, tmp_path):
    for failure in pool.run(hidden, 2, folder=tmp_path):
        assert "model-00001.safetensors" in failure
        assert "every rank must write in the same directory" in failure
    assert not list(tmp_path.glob("step-*"))


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    to, _ = saver(tmp_path / "file")
    begin(to, 1, last=True)
    failure = to.finish()
    assert failure is not None
    assert f"{tmp_path}/file (File exists)" in failure
