import json
import os
import random
import resource
import signal
import stat
import sys
from pathlib import Path

import pytest
import torch

from datasets.errors import UserError
from pretrain import checkpoint, pieces

STATE = {
    "step": 3,
    "sources": {"scenes": {"position": 2**60, "fingerprint": "ab"}},
    "loss": 0.1,
    "note": None,
}


def tensors(seed=0):
    torch.manual_seed(seed)
    return {
        "model": {"weight": torch.randn(5, 7), "scale": torch.tensor(2.5), "half": torch.randn(9).bfloat16()},
        "optimizer": {"weight/exp_avg": torch.randn(5, 7), "weight/step": torch.tensor(3)},
    }


def save(folder, step):
    return checkpoint.save(folder, step, tensors(step), {**STATE, "step": step})


def find(folder):
    said = []
    return checkpoint.find(folder, report=said.append), said


def same(a, b):
    """The same bits, not only equal values."""
    bits = [x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def holds(folder, step):
    loaded, state = checkpoint.Checkpoint(folder / f"step-{step:08d}", step).load()
    expected = tensors(step)
    assert state == {**STATE, "step": step}
    assert loaded.keys() == expected.keys()
    assert all(loaded[g].keys() == expected[g].keys() for g in expected)
    return all(same(loaded[g][n], expected[g][n]) for g in expected for n in expected[g])


def test_round_trip_of_every_dtype_and_shape(tmp_path):
    saved = {
        "model": {
            **{
                str(dtype): torch.tensor([[0, 1], [1, 0]]).to(dtype)
                for dtype in (
                    torch.bfloat16,
                    torch.float16,
                    torch.float64,
                    torch.int64,
                    torch.uint8,
                    torch.bool,
                )
            },
            "zero-d": torch.tensor(-0.0),
            "empty": torch.empty(0, 3),
            "not finite": torch.tensor([float("nan"), float("inf"), -float("inf")]),
            "strided": torch.arange(12.0).reshape(3, 4).t(),
            "trained": torch.nn.Parameter(torch.randn(3)),
        },
        "nothing": {},
    }
    path = checkpoint.save(tmp_path, 12, saved, STATE)
    assert path == tmp_path / "step-00000012"
    found, said = find(tmp_path)
    assert found is not None
    loaded, state = found.load()
    assert found.step == 12
    assert not said
    assert state == STATE
    assert {g: set(loaded[g]) for g in loaded} == {g: set(saved[g]) for g in saved}
    assert all(same(loaded["model"][name], saved["model"][name]) for name in saved["model"])


def test_tied_and_overlapping_weights_are_saved_in_full(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(6, 4)
            self.head = torch.nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

    model, other = Tied(), Tied()
    whole = torch.arange(10.0)
    state = model.state_dict()
    path = checkpoint.save(tmp_path, 1, {"model": state, "views": {"a": whole[2:6], "b": whole[4:]}}, {})
    loaded = checkpoint.Checkpoint(path, 1).load().tensors
    other.load_state_dict(loaded["model"])
    assert other.head.weight is other.embed.weight
    assert same(other.embed.weight, model.embed.weight)
    assert same(loaded["views"]["b"], whole[4:])


def test_loaded_tensors_outlive_the_files_and_saved_ones_are_untouched(tmp_path):
    given = tensors(1)
    before = {name: tensor.clone() for name, tensor in given["model"].items()}
    path = checkpoint.save(tmp_path, 1, given, {})
    loaded = checkpoint.Checkpoint(path, 1).load().tensors["model"]
    with (path / "model.safetensors").open("r+b") as file:
        file.write(bytes((path / "model.safetensors").stat().st_size))
    assert all(
        same(loaded[name], before[name]) and same(given["model"][name], before[name]) for name in before
    )


def test_nothing_there_is_no_checkpoint(tmp_path):
    assert find(tmp_path / "missing") == (None, [])
    assert find(tmp_path) == (None, [])


def flip(path, place):
    with path.open("r+b") as file:
        file.seek(place // 8)
        byte = file.read(1)[0] ^ 1 << place % 8
        file.seek(place // 8)
        file.write(bytes([byte]))


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
DAMAGE = {
    **{
        f"flip {name}": lambda step, name=name: flip(step / name, random.Random(name).randrange(300))
        for name in FILES
    },
    **{
        f"truncate {name}": lambda step, name=name: os.truncate(step / name, (step / name).stat().st_size - 1)
        for name in FILES
    },
    **{f"empty {name}": lambda step, name=name: os.truncate(step / name, 0) for name in FILES},
    **{f"remove {name}": lambda step, name=name: (step / name).unlink() for name in FILES},
    "longer": lambda step: (step / "model.safetensors").open("ab").write(b"\0"),
    "extra file": lambda step: (step / "notes.pkl").write_bytes(b""),
    "extra directory": lambda step: (step / "more").mkdir(),
    "file became directory": lambda step: ((step / "state.json").unlink(), (step / "state.json").mkdir()),
    "manifest of another step": lambda step: (step / "manifest.json").write_bytes(
        (step.parent / "step-00000002" / "manifest.json").read_bytes()
    ),
    "manifest is a list": lambda step: (step / "manifest.json").write_text("[]"),
    "manifest is hollow": lambda step: (step / "manifest.json").write_text(
        '{"format": 2, "step": 3, "files": null}'
    ),
    "manifest of another format": lambda step: (step / "manifest.json").write_text(
        (step / "manifest.json").read_text().replace('"format": 2', '"format": 9')
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_used(tmp_path, kind):
    for step in (1, 2, 3):
        save(tmp_path, step)
    DAMAGE[kind](tmp_path / "step-00000003")
    found, said = find(tmp_path)
    assert found == checkpoint.Checkpoint(tmp_path / "step-00000002", 2)
    assert holds(tmp_path, 2)
    assert "step-00000003 is damaged" in said[0]
    assert "step-00000003.corrupt" in said[0]
    assert "step-00000002" in said[1]
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"step-00000001", "step-00000002", "step-00000003.corrupt"}
    # It is met once; and the step, when reached again, is saved anew beside what was set aside.
    assert find(tmp_path)[1] == []
    save(tmp_path, 3)
    assert holds(tmp_path, 3)
    (tmp_path / "step-00000003" / "state.json").unlink()
    find(tmp_path)
    assert (tmp_path / "step-00000003.corrupt-2").is_dir()


@pytest.mark.parametrize("name", FILES)
def test_every_single_bit_counts(tmp_path, name):
    path = save(tmp_path, 3)
    bits = (path / name).stat().st_size * 8
    places = range(bits) if name == "manifest.json" else random.Random(0).sample(range(bits), 200)
    for place in places:
        flip(path / name, place)
        assert checkpoint._fault(path) is not None, place
        flip(path / name, place)
    assert checkpoint._fault(path) is None


def test_the_fault_is_named(tmp_path):
    path = save(tmp_path, 1)
    os.truncate(path / "model.safetensors", 10)
    assert "model.safetensors has 10 bytes" in str(checkpoint._fault(path))
    (path / "model.safetensors").unlink()
    assert checkpoint._fault(path) == "model.safetensors is missing"


def test_all_damaged_is_an_error_and_stays_one(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, step) / "model.safetensors", 700)
    for _ in range(2):
        with pytest.raises(UserError, match=r"step-00000001\.corrupt, step-00000002\.corrupt"):
            find(tmp_path)


def test_a_second_save_of_a_step_keeps_a_good_one_and_replaces_a_bad_one(tmp_path):
    path = save(tmp_path, 5)
    assert checkpoint.save(tmp_path, 5, tensors(6), {}) == path
    assert holds(tmp_path, 5)
    flip(path / "state.json", 8)
    assert save(tmp_path, 5) == path
    assert holds(tmp_path, 5)
    assert (tmp_path / "step-00000005.corrupt").is_dir()


def test_leftovers_of_dead_saves_are_removed(tmp_path):
    def rubbish():
        (tmp_path / "step-00000009.tmp-4711").mkdir(parents=True)
        (tmp_path / "step-00000009.tmp-4711" / "model.safetensors").write_bytes(b"half")

    rubbish()
    assert find(tmp_path) == (None, [])
    assert list(tmp_path.iterdir()) == []
    rubbish()
    path = save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [path]


def killer(call, number, when):
    """In a child: at the given call of os.fsync or os.replace, before or after it, kill -9.

    A kill before an fsync also loses the second half of that file, as a power cut may.
    """
    real, calls = getattr(os, call), [0]

    def patched(*arguments):
        calls[0] += 1
        if calls[0] == number and when == "before":
            if call == "fsync" and stat.S_ISREG(os.fstat(arguments[0]).st_mode):
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments)
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, call, patched)


# Four files, their directory, the parent.
PHASES = [("fsync", number, when) for number in range(1, 7) for when in ("before", "after")]
PHASES += [("replace", 1, "before"), ("replace", 1, "after")]


@pytest.mark.parametrize(("call", "number", "when"), PHASES)
def test_killed_in_every_phase_of_a_save(tmp_path, call, number, when, in_child):
    save(tmp_path, 1)
    assert in_child(lambda: (killer(call, number, when), save(tmp_path, 2))) == -signal.SIGKILL
    published = (call, number, when) == ("replace", 1, "after") or (call, number) == ("fsync", 6)
    found, said = find(tmp_path)
    assert found is not None
    assert found.step == (2 if published else 1)
    assert said == []
    assert holds(tmp_path, found.step)
    assert {p.name for p in tmp_path.iterdir()} == {f"step-{s:08d}" for s in range(1, found.step + 1)}
    save(tmp_path, 2)
    assert holds(tmp_path, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_save_syncs_each_file_then_its_directory_then_publishes(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".tmp")[0])
        fsync(descriptor)

    def replaced(source, target):
        events.append("publish")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    save(tmp_path / "checkpoints", 7)
    assert events == [*FILES, "step-00000007", "publish", "checkpoints"]


def test_a_full_disk_is_one_sentence_and_harms_nothing(tmp_path, in_child):
    save(tmp_path, 1)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        with pytest.raises(UserError) as caught:
            checkpoint.save(
                tmp_path, 2, {"model": {"w": torch.zeros(100)}, "o": {"w": torch.zeros(20_000)}}, {}
            )
        assert str(tmp_path) in str(caught.value)
        assert "File too large" in str(caught.value)

    assert in_child(work) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert holds(tmp_path, 1)


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=f"{tmp_path}/checkpoints"):
        save(tmp_path / "checkpoints", 1)


def test_prune_keeps_the_last_that_verify(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    flip(tmp_path / "step-00000005" / "state.json", 3)
    checkpoint.prune(tmp_path, keep=2)
    assert {p.name for p in tmp_path.iterdir()} == {f"step-0000000{step}" for step in (4, 5, 6)}
    with pytest.raises(AssertionError):
        checkpoint.prune(tmp_path, keep=1)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_nothing_is_unpickled_from_a_hostile_directory(tmp_path, monkeypatch, in_child):
    import pickle  # noqa: TID251 - the attacker's

    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    as_zip = tmp_path / "zip"
    torch.save(Bomb(), as_zip)

    def hostile(step, content):
        # With a manifest that verifies: whoever can write here can hash, too.
        path = tmp_path / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        contents: dict[str, bytes] = dict.fromkeys(("model.safetensors", "x.pkl", "x.pt"), content)
        contents["state.json"] = bomb if step == 1 else b"{}"
        files = {name: pieces.write(path / name, iter([what])) for name, what in contents.items()}
        manifest = json.dumps({"format": 1, "step": step, "files": files})
        (path / "manifest.json").write_text(manifest)

    hostile(1, bomb)
    hostile(2, as_zip.read_bytes())
    save(tmp_path / "checkpoints", 3)
    (tmp_path / "checkpoints" / "step-00000003" / "extra.pkl").write_bytes(bomb)
    heard = []

    def hook(event, arguments):
        if event.startswith(("pickle.", "marshal.loads", "exec", "os.system", "subprocess.")):
            heard.append(event)

    def work():
        sys.addaudithook(hook)
        found, said = find(tmp_path / "checkpoints")
        assert "extra.pkl does not belong" in said[0]
        assert found == checkpoint.Checkpoint(tmp_path / "checkpoints" / "step-00000002", 2)
        for step in (1, 2):
            with pytest.raises(UserError, match="cannot be read"):
                checkpoint.Checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}", step).load()
        assert heard == []
        assert not Path("exploded").exists()
        pickle.loads(bomb)  # it is live, and the hook hears it
        assert "pickle.find_class" in heard
        assert Path("exploded").exists()

    assert in_child(work) == 0
