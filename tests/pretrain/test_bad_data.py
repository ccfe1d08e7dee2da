"""Five samples in a hundred are bad: two ranks stop with a report, and one goes on where it is allowed."""

import json
import os
import subprocess
import sys
import tarfile
from io import BytesIO

import numpy as np
import pytest

from datasets.corpus import KINDS_OF_FILE, WAVES, encoded
from pretrain.sinks import jsonl

pytestmark = pytest.mark.slow

SHARDS, SAMPLES, BATCH = 4, 304, 64
STEPS = SHARDS * SAMPLES // BATCH  # one epoch
TINY = (
    f"--objectives itc --stages.one.steps {STEPS} --stages.one.batch {BATCH} --stages.one.resolution 16 "
    "--vocabulary 300 --model.embed 16 --model.text.width 16 --model.text.layers 1 --loader-threads 1"
)


def pack(path, samples):
    """A shard of samples: key, image, text."""
    with tarfile.open(path, "w") as tar:
        for key, image, text in samples:
            for suffix, content in (("jpg", image), ("txt", text)):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))


def good(number):
    """A sample that can be used."""
    return f"{number:05d}", encoded(np.roll(WAVES, number, axis=1), "JPEG"), f"rolled by {number}".encode()


ALL_GOOD = [good(number) for number in range(SAMPLES)]
BAD_STILL = {"00100", "00200"}  # less than 2 % of all


def checkpoint_step(out):
    return max(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of shards, and what is wrong with each bad sample of them."""
    folder, bad = tmp_path_factory.mktemp("data"), {}
    refused = [file for kind in KINDS_OF_FILE.values() for file in kind() if file.shows is None]
    random = np.random.default_rng(0)
    for shard in range(SHARDS):
        samples = []
        for number in range(SAMPLES):
            key, image, text = good(number)
            drawn = random.random()
            if drawn < 0.04:
                file = refused[len(bad) % len(refused)]
                image, bad[f"{shard:05d}.tar/{key}"] = file.data, file.fault
            elif drawn < 0.05:
                text, bad[f"{shard:05d}.tar/{key}"] = b"caf\xe9", "utf8"
            samples.append((key, image, text))
        pack(folder / f"{shard:05d}.tar", samples)
    return folder, bad


def launched(folder, out, scratch, *start, more=""):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(scratch / "cache")}
    arguments = f"-m pretrain.launch {TINY} --data {folder}/*.tar --out {out} {more}".split()
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def listed_in(path):
    return [(line["key"], line["kind"]) for line in map(json.loads, path.read_text().splitlines())]


def test_too_much_loss_stops_the_run_with_a_report_and_can_be_allowed(data, tmp_path):
    folder, bad = data
    out = tmp_path / "run"

    def train(*start, more=""):
        return launched(folder, out, tmp_path, *start, more=more)

    def listed():
        return listed_in(out / "quarantine.jsonl")

    stopped = train("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert stopped.returncode != 0
    said = (stopped.stdout + stopped.stderr).splitlines()
    reason = next(line for line in said if "error: " in line)
    assert "samples read so far cannot be used" in reason
    assert "--bad.overall 0.02" in reason
    assert 0 < len(listed()) < len(bad)
    assert set(listed()) <= set(bad.items())
    assert "What can be done" in (out / "quarantine.txt").read_text()

    allowed = train(more="--bad.overall 1")
    assert allowed.returncode == 0, allowed.stderr
    assert "from step " in allowed.stdout
    assert sorted(listed()) == sorted(bad.items())  # every one, and none twice
    reported = [record.get("data/masked") for record in jsonl.read(out / "metrics.jsonl")]
    assert len(bad) in reported


@pytest.fixture
def spoiled(tmp_path):
    """Shards of which one in eight samples is bad."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(SHARDS):
        samples = [(key, image if int(key) % 8 else b"no image", text) for key, image, text in ALL_GOOD]
        pack(folder / f"{shard:05d}.tar", samples)
    return folder


def test_a_run_goes_on_with_mended_shards_though_one_is_bad_still(spoiled, tmp_path):
    """What was lost to the old shards is held against the new ones neither overall nor shard by shard."""
    out = tmp_path / "run"
    stopped = launched(spoiled, out, tmp_path)
    assert stopped.returncode == 2
    assert "samples read so far cannot be used" in stopped.stderr
    first = listed_in(out / "quarantine.jsonl")
    for shard in range(SHARDS):
        samples = [(key, b"no image" if key in BAD_STILL else image, text) for key, image, text in ALL_GOOD]
        pack(spoiled / f"{shard:05d}.tar", samples)
    assert "--allow-changed" in launched(spoiled, out, tmp_path).stderr
    done = launched(spoiled, out, tmp_path, more="--allow-changed --bad.shard 0.05")
    assert done.returncode == 0, done.stderr
    assert "from step " in done.stdout
    assert listed_in(out / "quarantine.1.jsonl") == first
    assert 0 < len(listed_in(out / "quarantine.jsonl")) <= SHARDS * len(BAD_STILL)
    last = [each["data/masked"] for each in jsonl.read(out / "metrics.jsonl") if "data/masked" in each][-1]
    assert last > len(listed_in(out / "quarantine.jsonl"))  # the whole run is told, the list's part is judged


def test_a_list_that_was_deleted_is_forgiven(spoiled, tmp_path):
    out = tmp_path / "run"
    assert launched(spoiled, out, tmp_path).returncode == 2
    listed = len(listed_in(out / "quarantine.jsonl"))
    (out / "quarantine.jsonl").unlink()
    done = launched(spoiled, out, tmp_path)
    assert done.returncode == 0, done.stderr  # fewer than 1,000 samples were left
    assert 0 < len(listed_in(out / "quarantine.jsonl")) < listed


def test_a_budget_of_nothing_stops_before_the_step_of_the_first_bad_sample(spoiled, tmp_path):
    stopped = launched(spoiled, tmp_path / "run", tmp_path, more="--bad.overall 0 --bad.shard 1")
    assert stopped.returncode == 2
    assert f" of {BATCH} samples read so far cannot be used" in stopped.stderr
    assert checkpoint_step(tmp_path / "run") == 0
