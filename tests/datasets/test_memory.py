"""Reading holds on to nothing: what grows with the epochs would end a run of weeks."""

import gc
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from datasets import order
from datasets.corpus import encoded
from datasets.loader import Feed, Loader
from datasets.order import Shuffle
from datasets.shards.tars import Tars
from datasets.tokens import TrainedBPE

SHARDS, SAMPLES, BATCH = 6, 16, 8
PER_EPOCH = SHARDS * SAMPLES // BATCH
SETTLED, LAST = 3, 9  # epochs: caches of a fixed size fill up first
BYTES, BLOCKS = 30_000, 400  # of 576 samples; an object that each left behind would be more of either


@pytest.fixture
def source(tmp_path, pack, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = encoded(np.zeros((24, 24, 3), np.uint8), "JPEG")
    for shard in range(SHARDS):
        members = []
        for number in range(SAMPLES):
            bad = number == 3  # masked samples are remembered nowhere either
            members += [
                (f"{number:05d}.jpg", b"no image" if bad else image),
                (f"{number:05d}.txt", f"number {number} of {shard}".encode()),
            ]
        pack(tmp_path / f"{shard:05d}.tar", members)
    source = Tars(f"{tmp_path}/*.tar")
    yield source
    source.close()


def held():
    """Bytes and blocks that Python has allocated, open files, readers; what other tests left may end."""
    gc.collect()
    files = sum(each.is_file() for each in Path("/proc/self/fd").iterdir())
    readers = sum(each.name.startswith("reader") for each in threading.enumerate())
    return tracemalloc.get_traced_memory()[0], sys.getallocatedblocks(), files, readers


def test_nothing_grows_from_epoch_to_epoch(source):
    tokenizer = TrainedBPE.train(["number 1 of 2"] * 3, vocabulary=280, context_length=16)
    loader = Loader(
        [Feed(name="data", source=source)],
        tokenizer,
        seed=0,
        batch=BATCH,
        resolution=16,
        threads=2,
        shuffle=Shuffle(window=48),
    )
    next(loader.steps(0, 1))  # import what is imported late
    found = {}
    tracemalloc.start()
    try:
        for number in range(4096):
            order._round_keys(number)  # fill what is kept of the order
        for portion in loader.steps(0, LAST * PER_EPOCH + 1):
            epoch, rest = divmod(portion.step + 1, PER_EPOCH)
            if not rest and epoch in (SETTLED, LAST):
                found[epoch] = held()
    finally:
        tracemalloc.stop()

    bytes_before, blocks_before, *handles_before = found[SETTLED]
    bytes_after, blocks_after, *handles_after = found[LAST]
    assert bytes_after - bytes_before < BYTES
    assert blocks_after - blocks_before < BLOCKS
    assert handles_after == handles_before
