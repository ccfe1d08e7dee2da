"""A run on data that come slowly, or not at all for a while, says so and why, and trains on."""

import re
from functools import partial

import pytest

from datasets import index
from datasets.loader import Loader
from datasets.shards import tars
from datasets.testing import FaultServer, Misstep
from datasets.tokens import TrainedBPE
from pretrain import health as health_module
from pretrain import launch, loop
from pretrain.health import Bounds
from pretrain.sinks import jsonl

TINY = (
    "--objectives itc --stages.one.steps 12 --stages.one.batch 8 --stages.one.resolution 16 --vocabulary 300 "
    "--model.embed 16 --model.text.width 16 --model.text.layers 1 --loader-threads 1 --cadence.report 4 "
    "--shuffle.window 800 --wandb.mode disabled"
)


@pytest.fixture
def served(tmp_path, write_shard, monkeypatch):
    """A server of eight shards of 200 samples, and bounds that a short test of slow steps can reach."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(loop, "Loader", partial(Loader, patience=0.05))
    monkeypatch.setattr(health_module, "Bounds", partial(Bounds, wait=0.001, steps=4, seconds=0.01))
    monkeypatch.setattr(launch, "show", lambda training: None)
    monkeypatch.setattr(tars, "_GLANCE_FAR", 1)  # what is held back is meant for training, not for opening
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(8):
        write_shard(folder / f"{number:05d}.tar", "captions", samples=200)
    assert index.main([f"{folder}/*.tar"]) == 0
    with FaultServer(folder) as server:
        yield server


@pytest.fixture
def train(tmp_path, served, capsys):
    """Trains on what is served, with an empty cache; gives what was said, and the reports."""

    def train(more=""):
        out = tmp_path / "run"
        places = f"--data {served.url('manifest.json')} --remote.folder {tmp_path}/cache --out {out}"
        assert launch.main(f"{TINY} {places} {more}".split()) == launch.DONE
        return capsys.readouterr().out, list(jsonl.read(out / "metrics.jsonl"))

    return train


@pytest.fixture
def vocabulary(tmp_path):
    """In place, or it would be learned from all captions first, and the cache be full with them."""
    tokenizer = TrainedBPE.train(["small dog near red tree"] * 3, vocabulary=280, context_length=64)
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run" / "tokenizer.json")


@pytest.mark.usefixtures("vocabulary")
def test_a_stalled_shard_is_named_while_it_stalls_and_changes_nothing(served, train):
    stalls = [path.name for path in served.folder.glob("*.tar")]
    for name in stalls:
        served.script(name, Misstep(after=10, then="stall"))
    said, reports = train("--remote.stall 0.4")
    late = [line for line in said.splitlines() if line.startswith("warning: no data for the next step")]
    assert late
    pattern = r"reading (\d+\.tar) for \d+ s; fetches under way: \d+, the longest of (\S+) for"
    named = next(filter(None, (re.search(pattern, line) for line in late)), None)
    assert named, late
    assert named[1] in stalls
    assert named[2].removesuffix(".idx") in map(served.url, stalls), "or its sidecar"
    assert sum(each.get("data/retries", 0) for each in reports) >= 1
    assert {each["data/masked"] for each in reports if "data/masked" in each} == {0}


@pytest.mark.usefixtures("vocabulary")
def test_a_slow_network_is_what_holds_training_back(served, train):
    served.always("*", Misstep(pause=0.03))
    said, reports = train("--remote.connections 1")
    slow = [line for line in said.splitlines() if line.startswith("warning: training waits for data")]
    assert slow, said
    assert "the first shuffle window is being fetched" in slow[0]
    first = reports[0]
    assert 0 < first["data/cache_hits"] <= 1
    assert first["data/fetch_ms_p99"] >= first["data/fetch_ms_p50"] >= 30
    assert first["data/fetch_mib_per_second"] > 0


def test_reading_fast_enough_needs_no_words(served, train, monkeypatch):
    """With bounds as far away as those outside of tests are for so short a run."""
    monkeypatch.setattr(loop, "Loader", partial(Loader, patience=300.0))
    monkeypatch.setattr(health_module, "Bounds", partial(Bounds, seconds=300.0))
    said, reports = train()
    assert "warning" not in said
    assert {"data/queue", "data/cache_hits", "data/read_ms_p50", "data/decode_ms_p50"} <= set(reports[0])
