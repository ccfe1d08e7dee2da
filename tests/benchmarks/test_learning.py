"""The benchmark against open_clip_train: both do the same work; time and recall are told right."""

import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks import learning
from benchmarks.learning.pairs import write_pairs
from benchmarks.learning.recall import Examination, write_initial
from benchmarks.learning.report import curves, plot, tables
from benchmarks.learning.systems import Job, Settings, medley, open_clip_train
from benchmarks.learning.watch import Training, cpu_seconds, watch
from datasets.errors import UserError
from pretrain.cli import parse
from pretrain.optim import Optim

SMALL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "vit-small.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def encoded(colour, kind):
    buffer = io.BytesIO()
    Image.new("RGBA" if len(colour) == 4 else "RGB", (20, 16), colour).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def read_tars(folder):
    members = {}
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            members |= {each.name: cast(Any, tar.extractfile(each)).read() for each in tar}
    return members


def job(model, tmp_path, **changes):
    settings = {"batch": 6, "lr": 2e-3, "crop": 0.7, "marks": 4, "cpu_seconds": 1.0, **changes}
    return Job(
        settings=Settings(model=model, **settings),
        every=5,
        marks=4,
        seed=3,
        initial=tmp_path / "initial.safetensors",
        folder=tmp_path,
    )


def test_every_caption_becomes_a_pair_and_unreadable_samples_none(tmp_path):
    red, clear = encoded((255, 0, 0), "JPEG"), encoded((0, 0, 0, 0), "PNG")
    write_tar(
        tmp_path / "data" / "00000.tar",
        {
            "0.jpg": red,
            "0.json": b'{"captions": ["one", "two"]}',
            "1.png": clear,
            "1.txt": b"nothing",
            "2.jpg": red,
            "2.txt": b"\xff",
            "3.txt": b"no image",
        },
    )
    pattern = write_pairs(str(tmp_path / "data" / "*.tar"), tmp_path / "pairs")
    assert pattern == f"{tmp_path}/pairs/{{00000..00000}}.tar"
    members = read_tars(tmp_path / "pairs")
    images = {members[f"{key}.txt"]: name for name in members for key in [name[:9]] if name[-3:] != "txt"}
    assert sorted(images) == [b"nothing", b"one", b"two"]
    assert members[images[b"one"]] == members[images[b"two"]] == red
    shown = np.asarray(Image.open(io.BytesIO(members[images[b"nothing"]])))
    assert shown.shape == (16, 20, 3)
    assert shown.min() == 255  # transparent is white, as Medley sees it


def test_both_commands_ask_for_the_same_work(model, tmp_path):
    from open_clip_train.params import parse_args

    work = job(model, tmp_path)
    ours = medley(work, data="data/*.tar", optim=work.settings.optim)
    peers = open_clip_train(work, python=Path("python"), pairs="pairs/{00000..00001}.tar", precision="fp32")
    theirs: Any = parse_args(list(peers.command[5:]))
    run: Any = parse(ours.command[3:]).run
    stage, optim = run.stages["one"], run.stages["one"].optim
    assert theirs.epochs * theirs.train_num_samples == stage.steps * stage.batch == 120
    assert theirs.train_num_samples == run.cadence.checkpoint * stage.batch
    assert (theirs.batch_size, theirs.lr, theirs.warmup) == (stage.batch, optim.lr, optim.warmup)
    assert (theirs.beta1, theirs.beta2) == optim.betas
    assert (theirs.eps, theirs.wd, theirs.grad_clip_norm) == (optim.eps, optim.weight_decay, optim.clip)
    assert theirs.aug_cfg == {"scale": (stage.augment.crop, 1.0)}
    assert not stage.augment.flip
    assert optim.kind == theirs.opt == "adamw"
    assert (theirs.workers, run.loader_threads, run.precision.threads) == (1, 1, 1)
    assert theirs.seed == run.seed == 3
    assert theirs.pretrained == str(run.model.pretrained) == str(work.initial)
    assert stage.resolution == 16
    assert list(ours.names) == list(peers.names) == [5, 10, 15, 20]


def test_the_schedules_are_the_same_function():
    from open_clip_train.scheduler import cosine_lr

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
    rate, optim = cosine_lr(optimizer, 0.5, 7, 50), Optim(lr=0.5, warmup=7)
    assert [rate(step) for step in range(50)] == pytest.approx([optim.lr_at(step, 50) for step in range(50)])


BUSY = """
import subprocess, sys, time
from pathlib import Path
def burn():
    while time.process_time() < 0.3: pass
if len(sys.argv) > 1:
    burn()
else:
    for number in "12":
        subprocess.run([sys.executable, __file__, "child"]) if number == "1" else burn()
        Path(__file__).with_name(f"mark-{number}").touch()
        while not Path(__file__).with_name(f"read-{number}").exists(): time.sleep(0.1)
"""


def test_the_time_of_children_counts_and_sleep_does_not(tmp_path, monkeypatch):
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    training = Training(
        command=[sys.executable, str(script)],
        checkpoints=tmp_path,
        names={1: "mark-1", 2: "mark-2*"},
        weights={},
    )
    reads = iter(("read-1", "read-2"))

    def said(process):
        """Until it has been read, the program sleeps."""
        found = cpu_seconds(process)
        (tmp_path / next(reads)).touch()
        return found

    monkeypatch.setattr("benchmarks.learning.watch.cpu_seconds", said)
    before = time_of_children()
    seen = watch(training, environment={}, log=tmp_path / "log")
    whole = time_of_children() - before
    assert list(seen) == [1, 2]
    assert 0.25 <= seen[1] < seen[2] <= whole + 0.05
    assert seen[2] >= 0.55  # /proc counts in hundredths


def time_of_children():
    times = os.times()
    return times.children_user + times.children_system


def test_a_program_that_fails_is_named_by_its_log(tmp_path):
    training = Training(
        command=[sys.executable, "-c", "raise SystemExit(3)"],
        checkpoints=tmp_path,
        names={1: "a"},
        weights={},
    )
    with pytest.raises(UserError, match=r"exit code 3.*log"):
        watch(training, environment={}, log=tmp_path / "log")


def test_recall_is_that_of_the_weights_whoever_saved_them(model, tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    members = {}
    for place, colour in enumerate(colours):
        members[f"{place}.jpg"] = encoded(colour, "JPEG")
        members[f"{place}.json"] = json.dumps({"captions": [f"colour {place}", f"{place} again"]}).encode()
    write_tar(tmp_path / "val" / "0.tar", members)
    initial = tmp_path / "initial.safetensors"
    write_initial(initial, model=model, seed=0)
    examination = Examination.on(str(tmp_path / "val" / "*.tar"), model=model, resolution=16)
    theirs = examination.recall(initial)
    assert theirs["image_to_text_recall@10"] == 1.0

    weights = examination._model(initial).state_dict()
    saved = {f"model.{name}": each for name, each in weights.items() if not name.startswith("captioner.")}
    save_file(saved, tmp_path / "ours.safetensors")
    assert examination.recall(tmp_path / "ours.safetensors") == theirs
    write_initial(tmp_path / "again.safetensors", model=model, seed=0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(*map(tensors, (initial, tmp_path / "again.safetensors")), strict=True)
    )


def tensors(path):
    return list(load_file(path).values())


def run_of(seconds, values):
    names = [f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    return [
        {"step": 10 * n, "cpu_seconds": float(at), **dict.fromkeys(names, value)}
        for n, (at, value) in enumerate(zip(seconds, values, strict=True))
    ]


def test_the_verdict_names_the_times_at_which_medley_is_behind(tmp_path):
    found = {
        "open_clip": curves([run_of([0, 10, 20], [0, 0.2, 0.3]), run_of([0, 10, 20], [0, 0.2, 0.5])]),
        "same_steps": curves([run_of([0, 5, 10], [0, 0.2, 0.4])] * 2),
        "same_budget": curves([run_of([0, 10, 20], [0, 0.1, 0.6])] * 2),
    }
    lines = tables(found, batch=3)
    assert (
        "image_to_text_recall@1: Medley is ahead at 1 of 2 times, not at 10 s (0.100 against 0.200); "
        "what open_clip_train has after 20 s it reaches after 16 s"  # 0.4, between 0.1 at 10 and 0.6 at 20
    ) in lines
    # Half way between 0.2 and 0.3 for one seed, 0.2 and 0.5 for the other.
    assert any(line.startswith("| 15 s | open_clip_train | 0.300 (0.250-0.350)") for line in lines)
    assert any(
        line.startswith("open_clip_train: 3 (3-3) samples per CPU second, 0 s to start") for line in lines
    )
    plot({"toy": found}, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 500


def test_the_peers_driver_imports_nothing_of_medley():
    text = Path(learning.__file__).with_name("peer.py").read_text()
    imported = re.findall(r"^ *(?:import|from) (\w+)", text, re.M)
    assert "open_clip_train" in imported
    assert not {"benchmarks", "datasets", "objectives", "pretrain"} & set(imported)
