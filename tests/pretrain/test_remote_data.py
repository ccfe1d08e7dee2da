"""A run on remote shards is the run on local ones, whatever the server does for a while.

What it does for good stops the run with the shard's name.
"""

import random

import pytest

from datasets import index
from datasets.testing import BUSY, MISSING, RESET, FaultServer, Misstep
from pretrain import launch

TINY = (
    "--objectives itc --stages.one.steps 10 --stages.one.batch 16 --stages.one.resolution 16 "
    "--vocabulary 300 "
    "--model.embed 16 --model.text.width 16 --model.text.layers 1 --loader-threads 2 --precision.threads 1 "
    "--wandb.mode disabled --remote.stall 0.5"
)
FOR_A_WHILE = (
    RESET,
    BUSY,
    Misstep(after=3_000, then="reset"),
    Misstep(after=2_000, then="close"),
    Misstep(after=1_000, then="close", length=False),
    Misstep(after=500, then="stall"),
    Misstep(ranges=False),
    Misstep(shift=7),
    Misstep(flip=True),
    Misstep(status=429, headers=(("Retry-After", "0"),)),
)


@pytest.fixture
def served(tmp_path, write_shard, monkeypatch):
    """A server of four indexed shards, of 80 samples each."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(launch, "show", lambda training: None)
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(4):
        write_shard(folder / f"{number:05d}.tar", "captions", samples=80)
    assert index.main([f"{folder}/*.tar"]) == 0
    with FaultServer(folder) as server:
        yield server


def train(tmp_path, data, *, out, more=""):
    places = f"--data {data} --remote.folder {tmp_path}/cache-{out} --out {tmp_path}/{out}"
    return launch.main(f"{TINY} {places} {more}".split())


def test_what_fails_for_a_while_changes_nothing_in_the_ledger(tmp_path, served):
    assert train(tmp_path, served.folder / "manifest.json", out="local") == launch.DONE
    drawn = random.Random(0)
    for path in served.folder.glob("*.tar"):
        served.script(path.name, *drawn.choices(FOR_A_WHILE, k=4))
    assert train(tmp_path, served.url("manifest.json"), out="remote") == launch.DONE
    assert (tmp_path / "remote/ledger").read_bytes() == (tmp_path / "local/ledger").read_bytes()
    assert len(served.requests) > 4 * 4
    assert not (tmp_path / "remote/quarantine.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (MISSING, "00002.tar cannot be read: the server said 404"),
        (Misstep(after=100, then="stall"), "00002.tar could not be read within 8 s"),
        (BUSY, "00002.tar could not be read within 8 s: the server said 503"),
    ],
    ids=["gone", "stalled", "busy"],
)
def test_what_fails_for_good_stops_the_run_with_the_shard_named(tmp_path, served, capsys, fault, said):
    served.always("00002.tar", fault)
    answer = train(tmp_path, served.url("manifest.json"), out="run", more="--remote.deadline 8")
    assert answer == launch.USER_ERROR
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
