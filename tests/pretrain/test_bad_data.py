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

SHARDS, SAMPLES, BATCH = 4, 304, 64
STEPS = SHARDS * SAMPLES // BATCH  # one epoch
TINY = (
    f"--objectives itc --stages.one.steps {STEPS} --stages.one.batch {BATCH} --stages.one.resolution 16 "
    "--vocabulary 300 --model.embed 16 --model.text.width 16 --model.text.layers 1 --loader-threads 1"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of shards, and what is wrong with each bad sample of them."""
    folder, bad = tmp_path_factory.mktemp("data"), {}
    refused = [file for kind in KINDS_OF_FILE.values() for file in kind() if file.shows is None]
    random = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(SAMPLES):
                image, text = encoded(np.roll(WAVES, number, axis=1), "JPEG"), f"rolled by {number}".encode()
                drawn = random.random()
                if drawn < 0.04:
                    file = refused[len(bad) % len(refused)]
                    image, bad[f"{shard:05d}.tar/{number:05d}"] = file.data, file.fault
                elif drawn < 0.05:
                    text, bad[f"{shard:05d}.tar/{number:05d}"] = b"caf\xe9", "utf8"
                for suffix, content in (("jpg", image), ("txt", text)):
                    member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
    return folder, bad


def test_too_much_loss_stops_the_run_with_a_report_and_can_be_allowed(data, tmp_path):
    folder, bad = data
    out = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def train(*start, more=""):
        arguments = f"-m pretrain.launch {TINY} --data {folder}/*.tar --out {out} {more}".split()
        command = [sys.executable, *start, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    def listed():
        lines = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
        return [(line["key"], line["kind"]) for line in lines]

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
