"""Killed, cut short, swapped, full: one that verifies is always there, and no other is taken for one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from datasets.errors import UserError
from pretrain import checkpoint, pieces
from pretrain.distributed import Ranks
from pretrain.flight import Saver
from pretrain.pieces import Piece, Region, Saved, whole

RANKS = 3
FILES = [
    *(f"{group}-{rank:05d}.safetensors" for group in ("model", "optimizer") for rank in range(RANKS)),
    "state.json",
    "manifest.json",
]

NAMES = ("model", "optimizer", "state", "manifest")


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.arange(35.0).reshape(7, 5) + step
    return {
        "model": {"weight": weight, "row": torch.full((1, 4), step).bfloat16(), "number": torch.tensor(step)},
        "optimizer": {"weight.exp_avg": -weight, "weight.step": torch.tensor(float(step))},
    }


def part(named: dict[str, torch.Tensor], rank: int) -> dict[str, Piece]:
    """Rows of each tensor as FSDP2 shares them out, some ranks none; rank zero has the numbers."""
    found = {}
    for name, tensor in named.items():
        region = whole(tuple(tensor.shape))
        if tensor.ndim:
            rows = -(-len(tensor) // RANKS)
            start = min(rank * rows, len(tensor))
            size = (min(rows, len(tensor) - start), *tensor.shape[1:])
            region = Region((start, *region.start[1:]), size)
        if (rank == 0 or tensor.ndim) and 0 not in region.size:
            mine = tensor[region.within(whole(tuple(tensor.shape)))].clone()
            found[name] = Piece(mine, region, tuple(tensor.shape))
    return found


def save(folder: Path, step: int, unwanted: Event | None = None) -> Path:
    """What the ranks do, one after the other."""
    beside = checkpoint.begin(folder, step)
    assert beside is not None
    files = {}
    for rank in range(RANKS):
        mine = {group: part(named, rank) for group, named in tensors(step).items()}
        state = {"step": step} if rank == 0 else None
        files |= checkpoint.write_part(beside, mine, rank=rank, state=state, unwanted=unwanted)
    return checkpoint.commit(beside, files)


def flat(groups: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{group} {name}": each for group, named in groups.items() for name, each in named.items()}


def holds(folder: Path, step: int) -> bool:
    loaded, state = checkpoint.Checkpoint(folder / f"step-{step:08d}", step).load()
    there = {(group, name): tensor for group, named in loaded.items() for name, tensor in named.items()}
    given = {
        (group, name): tensor for group, named in tensors(step).items() for name, tensor in named.items()
    }
    return (
        state == {"step": step}
        and there.keys() == given.keys()
        and all(there[at].dtype == given[at].dtype and torch.equal(there[at], given[at]) for at in given)
    )


def find(folder: Path) -> tuple[int | None, list[str]]:
    said: list[str] = []
    found = checkpoint.find(folder, report=said.append)
    return found and found.step, said


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Death(Event):
    """Kills this process just before it touches a folder for the nth time, in whatever way."""

    def __init__(self, folder: Path, number: int) -> None:
        super().__init__()
        self._left, self._folder = number, str(folder)
        real = os.fsync
        pieces._CHUNK = 100
        sys.addaudithook(self._heard)

        def fsync(descriptor):
            self._tick()
            real(descriptor)

        os.fsync = fsync

    def is_set(self) -> bool:
        """Asked before each chunk is written."""
        self._tick()
        return False

    def _heard(self, event: str, arguments: tuple) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"):
            at = arguments[0]
            # What rmtree removes is named in a folder that it holds open.
            if isinstance(at, str | Path) and (
                str(at).startswith(self._folder) or not str(at).startswith("/")
            ):
                self._tick()

    def _tick(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_killed_in_every_phase_from_making_the_directory_to_removing_the_oldest(tmp_path, in_child):
    ended, phases, found = None, 0, []
    while ended != 0:
        phases += 1
        folder = tmp_path / str(phases)
        save(folder, 1)
        save(folder, 2)

        def work(folder=folder, number=phases):
            save(folder, 3, unwanted=Death(folder, number))
            checkpoint.prune(folder, keep=2)

        ended = in_child(work)
        assert ended in (0, -signal.SIGKILL)
        step, said = find(folder)
        assert said == [], phases
        assert step is not None
        assert holds(folder, step)
        assert step - 1 in (1, 2)
        assert holds(folder, step - 1)
        assert all(".tmp-" not in name for name in names(folder))
        found.append(step)
        if step == 2:
            assert save(folder, 3).name == "step-00000003"
        checkpoint.prune(folder, keep=2)
        assert names(folder) == ["step-00000002", "step-00000003"]
        shutil.rmtree(folder)
    assert found == sorted(found), "once it is a checkpoint, it stays one"
    assert phases > 60
    assert (found[0], found[-1]) == (2, 3)


def swap(step: Path, name: str) -> None:
    shutil.copy(step.parent / "step-00000002" / name, step / name)


def flip(path: Path) -> None:
    place = random.Random(path.name).randrange(path.stat().st_size * 8)
    content = bytearray(path.read_bytes())
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


DAMAGE = {
    "flipped": lambda step, name: flip(step / name),
    "cut short": lambda step, name: os.truncate(step / name, (step / name).stat().st_size - 1),
    "empty": lambda step, name: os.truncate(step / name, 0),
    "missing": lambda step, name: (step / name).unlink(),
    "of another step": swap,
    "a file too many": lambda step, name: (step / f"x{name}").write_bytes(b""),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_one_damaged_piece_is_a_damaged_checkpoint(tmp_path, damage, name):
    save(tmp_path, 2)
    save(tmp_path, 3)
    DAMAGE[damage](tmp_path / "step-00000003", name)
    step, said = find(tmp_path)
    assert step == 2
    assert "step-00000003 is damaged" in said[0]
    assert holds(tmp_path, 2)
    assert names(tmp_path) == ["step-00000002", "step-00000003.corrupt"]


def test_the_files_are_those_of_the_ranks_that_hold_something(tmp_path):
    path = save(tmp_path, 3)
    assert names(path) == sorted(FILES)
    assert holds(tmp_path, 3)
    with safe_open(path / "model-00001.safetensors", "pt") as file:
        assert list(file.keys()) == ["weight"]
        places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    assert places == {"weight": {"saved_offsets": [3, 0], "shape": [7, 5]}}


def resealed(path: Path) -> None:
    """Give a directory a manifest that verifies: whoever can write there can hash, too."""
    (path / "manifest.json").unlink()
    beside = path.rename(path.with_name(f"{path.name}.tmp-0"))
    files = {}
    for name in names(beside):
        content = (beside / name).read_bytes()
        (beside / name).unlink()
        files[name] = pieces.write(beside / name, iter([content]))
    checkpoint.commit(beside, files)


def test_what_no_file_holds_is_not_made_up(tmp_path):
    path = save(tmp_path, 3)
    (path / "model-00001.safetensors").unlink()
    resealed(path)
    found = checkpoint.chosen(tmp_path, 3)
    with pytest.raises(UserError, match=r"cannot be read \(parts of weight are missing\)"):
        found.load()
    # Rows that are there are read all the same, by whom they concern.
    rows = found.tensors()["model"].read("weight", Region((0, 0), (3, 5)))
    assert torch.equal(rows, tensors(3)["model"]["weight"][:3])


def test_pieces_of_unlike_tensors_do_not_make_one(tmp_path):
    path = save(tmp_path, 3)
    piece = Piece(torch.zeros(2, 5), Region((3, 0), (2, 5)), (9, 5))
    (path / "model-00001.safetensors").unlink()
    pieces.write(path / "model-00001.safetensors", pieces.serialised({"weight": piece}))
    resealed(path)
    with pytest.raises(UserError, match="holds a part of another weight than the files before it"):
        checkpoint.chosen(tmp_path, 3).load()


@pytest.mark.parametrize("places", ["no JSON", "[]", "{}", '{"weight": {"shape": [7, 5]}}', '{"weight": 3}'])
def test_a_header_that_says_nothing_sensible_is_one_sentence(tmp_path, places):
    path = save(tmp_path, 3)
    save_file({"weight": torch.zeros(2, 5)}, path / "model-00001.safetensors", {"DCP_SHARDING_INFO": places})
    resealed(path)
    with pytest.raises(UserError, match="cannot be read") as caught:
        checkpoint.chosen(tmp_path, 3).load()
    assert "\n" not in str(caught.value)


def test_nothing_is_unpickled_whatever_its_name(tmp_path, in_child):
    import pickle  # noqa: TID251 - the attacker's

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    bomb = pickle.dumps(Bomb())
    for step, name in enumerate((".metadata", "model-00001.safetensors", "model-00009.safetensors"), start=1):
        path = save(tmp_path / "checkpoints", step)
        (path / name).write_bytes(bomb)
        resealed(path)
    heard = []

    def work():
        sys.addaudithook(lambda event, _: heard.append(event) if event.startswith("pickle.") else None)
        # A file that belongs to no group is not even opened.
        assert holds(tmp_path / "checkpoints", 1)
        for step in (2, 3):
            with pytest.raises(UserError, match="cannot be read"):
                checkpoint.chosen(tmp_path / "checkpoints", step).load()
        assert heard == []

    assert in_child(work) == 0
    assert not (tmp_path / "exploded").exists()


def test_each_reads_only_what_it_needs(tmp_path):
    path = save(tmp_path, 3)
    saved = Saved(path, "model")
    given, read = tensors(3)["model"]["weight"], []
    for first in range(7):
        for last in range(first, 8):
            region = Region((first, 1), (last - first, 3))
            rows = saved.read("weight", region)
            assert torch.equal(rows, given[first:last, 1:4])
            assert rows.untyped_storage().nbytes() == 4 * rows.numel()
            read.append(rows.numel())
    assert len(read) == 35


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_can_read_it_too(tmp_path):
    path = save(tmp_path, 3)
    given = {name: tensor for named in tensors(3).values() for name, tensor in named.items()}
    found = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    load(found, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    assert all(torch.equal(found[name], given[name]) for name in given)


def test_a_checkpoint_of_the_first_format_is_taken_up(tmp_path):
    path = tmp_path / "step-00000003"
    path.mkdir()
    for group, named in tensors(3).items():
        save_file(named, path / f"{group}.safetensors")
    (path / "state.json").write_text('{"step": 3}')
    resealed_as_first(path)
    assert find(tmp_path) == (3, [])
    assert holds(tmp_path, 3)


def resealed_as_first(path: Path) -> None:
    (path / "manifest.json").write_text("{}")
    resealed(path)
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with a megabyte of room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full(small_disk):
    """The partial file is gone, the old checkpoint stays, and once there is room the next one is written."""
    said: list[str] = []
    alone = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
    to = Saver(alone, small_disk / "checkpoints", keep=2, keep_every=0, note=said.append)
    weight = torch.randn(100_000)
    to.begin(1, lambda: {"model": {"w": weight}}, {})
    assert to.finish() is None
    (small_disk / "other").write_bytes(bytes(400_000))
    to.begin(2, lambda: {"model": {"w": weight}}, {})
    assert to.finish() is not None
    assert "No space left on device" in said[0]
    assert names(small_disk / "checkpoints") == ["step-00000001"]
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.save(small_disk / "checkpoints", 2, {"model": {"w": weight}}, {})
    (small_disk / "other").unlink()
    to.begin(3, lambda: {"model": {"w": weight}}, {})
    assert to.finish() is None
    assert names(small_disk / "checkpoints") == ["step-00000001", "step-00000003"]
    to.close()
