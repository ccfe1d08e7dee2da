"""A step that does not come is told of while it is waited for, and nothing else changes."""

import threading
import time
from itertools import pairwise
from threading import Event

import pytest
import torch

from datasets.errors import ShardError
from datasets.health import Meter
from datasets.loader import Feed, Loader
from datasets.sample import Sample
from datasets.tokens import TrainedBPE

TOKENIZER = TrainedBPE.train(["picture number 1"] * 3, vocabulary=280, context_length=16)
FIRST = 0.01  # seconds until a step is late
STALLED = ["sample 5"]  # and nothing else is read


class Stalled:
    """Sample 5 is read when `go` is set."""

    name, fingerprint, size, remote = "stalled", "0", None, False
    fields = frozenset({"image", "text"})

    def __init__(self):
        self.go = Event()
        self.meter = Meter()

    def doing(self):
        return [each.what for each in self.meter.running()]

    def read(self, index, *, seed, resolution, augment=None, fields=()):
        with self.meter.timed("read", f"sample {index}"):
            if index == 5 and not self.go.wait(300):
                raise TimeoutError("never told to go on")
        return Sample(
            key=f"s/{index}", image=torch.zeros(3, resolution, resolution, dtype=torch.uint8), captions=("a",)
        )


def steps(source, late, **more):
    settings = {"seed": 1, "batch": 4, "resolution": 2, "threads": 2, "patience": FIRST, **more}
    return Loader([Feed(name="data", source=source)], TOKENIZER, late=late, **settings).steps(0, 5)


def test_a_late_step_is_told_of_again_after_twice_as_long_and_comes_nevertheless():
    source, told = Stalled(), []

    def late(seconds):
        if source.doing() == STALLED:  # on a slow machine other steps are late too
            told.append(seconds)
        if len(told) == 3:
            source.go.set()

    read = [portion.batches[0].keys for portion in steps(source, late)]
    assert read == [tuple(f"s/{i}" for i in range(first, first + 4)) for first in range(0, 20, 4)]
    assert told[0] >= FIRST
    assert all(later >= 2 * before for before, later in pairwise(told[:3]))


def test_nobody_is_told_where_nobody_asks():
    source = Stalled()
    portions = steps(source, None)
    next(portions)
    source.go.set()
    assert len(list(portions)) == 4


def test_a_shard_that_is_gone_is_told_at_once_though_others_wait_for_it():
    class Gone(Stalled):
        def read(self, index, **options):
            if index == 0:
                raise ShardError("00000.tar is gone")
            return super().read(index if index < 16 else 5, **options)

    source = Gone()
    portions = steps(source, None, batch=32)
    with pytest.raises(ShardError, match=r"00000\.tar is gone"):
        next(portions)
    until = time.monotonic() + 120
    while source.doing() != STALLED:  # in another thread
        assert time.monotonic() < until
        time.sleep(0.001)
    source.go.set()
    for thread in threading.enumerate():
        if thread.name.startswith("reader"):
            thread.join(60)


def test_an_error_of_a_late_step_is_raised_as_it_was_also_a_timeout():
    class Failing(Stalled):
        def read(self, index, **options):
            super().read(index, **options)
            if index == 5:
                raise TimeoutError("the disk")
            return super().read(index, **options)

    source = Failing()
    portions = steps(source, lambda seconds: source.go.set())
    next(portions)
    with pytest.raises(TimeoutError, match="the disk"):
        list(portions)
