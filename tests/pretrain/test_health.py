"""What reports say of reading, on one rank and on several, and when a sentence is said."""

import math

import pytest
import torch

from datasets.health import Meter
from datasets.mixture import Account
from pretrain.bottleneck import Setting, Stored
from pretrain.clock import Clock
from pretrain.distributed import Ranks
from pretrain.health import Bounds, Health, figures

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
SETTING = Setting(threads=1, cores=4)
BOUNDS = Bounds(wait=0.2, steps=5, seconds=2.0, again=100.0)


class Run:
    """Training by a clock that is turned by hand."""

    def __init__(self, setting=SETTING, ranks=ALONE, bounds=BOUNDS):
        self.now, self.meter, self.position = 0.0, Meter(), 0
        self.clock = Clock(now=lambda: self.now)
        self.health = Health(self.meter, setting, ranks, accounts={}, bounds=bounds)

    def steps(self, count, *, wait, work, cold=False, doing="decode", samples=10):
        for _ in range(count):
            with self.clock.waiting(cold=cold):
                self.now += wait
            self.now += work
            self.meter.add("steps")
            self.meter.add("queue", 0.0 if wait else 3.0)
            self.meter.record(doing, wait + work)
            self.position += samples
            self.clock.step(samples)
        return self

    def report(self):
        accounts = {"web": Account(position=self.position)}
        return self.health.report(self.clock.read(remaining=0), accounts)


def test_figures_are_since_the_last_report_and_what_did_not_happen_is_left_out():
    run = Run()
    found, said = run.steps(4, wait=0.0, work=0.5).report()
    assert said is None
    assert set(found) == {"perf/data_wait", "data/queue", "data/decode_ms_p50"}
    assert found["data/queue"] == 3
    assert found["data/decode_ms_p50"] == pytest.approx(500, rel=0.05)
    run.meter.record("read", 0.002)
    run.meter.record("read", 0.2)
    run.meter.add("retry", 2)
    found, _ = run.steps(4, wait=0.5, work=0.5).report()
    assert found["data/queue"] == 0
    assert found["data/read_ms_p50"] == pytest.approx(2, rel=0.05)
    assert found["data/read_ms_p99"] == pytest.approx(200, rel=0.05)
    assert found["data/retries"] == 2
    assert "data/retries" not in run.steps(1, wait=0.0, work=1.0).report()[0]


def test_what_was_read_before_does_not_count():
    meter = Meter()
    meter.record("read", 100.0)
    Health(meter, SETTING, ALONE, accounts={})
    assert meter.take() == {}


def test_the_network_is_told_by_bytes_and_hits():
    run = Run()
    run.meter.add("cache_hit", 30)
    run.meter.add("cache_miss", 10)
    run.meter.add("fetch_bytes", 8 * 2**20)
    found, _ = run.steps(2, wait=0.0, work=1.0).report()
    assert found["data/cache_hits"] == 0.75
    assert found["data/fetch_mib_per_second"] == 4


def test_a_sentence_comes_when_training_waits_and_again_only_after_a_while_or_for_another_reason():
    run = Run()
    assert run.steps(10, wait=0.1, work=0.9).report()[1] is None, "10 % is no reason"
    said = run.steps(10, wait=0.5, work=0.5).report()[1]
    assert said is not None
    assert said.startswith("warning: training waits for data 50% of the time: decoding")
    assert run.steps(10, wait=0.5, work=0.5).report()[1] is None
    other = run.steps(10, wait=0.5, work=0.5, doing="read").report()[1]
    assert other is not None
    assert "storage" in other
    quiet = [run.steps(10, wait=0.5, work=0.5, doing="read").report()[1] for _ in range(12)]
    assert [bool(each) for each in quiet] == [False] * 9 + [True] + [False] * 2, "after 100 s"


def test_reports_of_few_steps_are_judged_together():
    run = Run()
    said = [run.steps(1, wait=0.5, work=0.5).report()[1] for _ in range(5)]
    assert [bool(each) for each in said] == [False] * 4 + [True]
    assert Run().steps(50, wait=0.01, work=0.01).report()[1] is None, "one second is too little to judge"


def test_a_cold_start_is_no_lasting_cause():
    run = Run()
    run.steps(1, wait=60.0, work=0.5, cold=True)
    found, said = run.steps(9, wait=0.0, work=0.5).report()
    assert said is None
    assert found["perf/data_wait"] > 0.9, "but it was waited"


def test_the_first_window_of_remote_data_is_a_start_and_the_second_is_not():
    setting = Setting(threads=1, cores=4, stored={"web": Stored(size=200, bytes=200 * 2**20)})
    run = Run(setting)

    def fetch():
        run.meter.add("cache_miss", 10)
        run.meter.add("fetch_bytes", 64 * 2**20)
        return run.steps(10, wait=0.5, work=0.5, doing="read").report()[1]

    first = fetch()
    assert first is not None
    assert "64 MiB so far of at most 200 MiB" in first
    second = fetch()
    assert second is not None
    assert "raise --remote.connections" in second


def test_a_late_step_knows_what_came_before_it():
    setting = Setting(threads=1, cores=4, stored={"web": Stored(size=200, bytes=200 * 2**20)})
    run = Run(setting)
    run.meter.add("fetch_bytes", 2**30)
    run.steps(1, wait=0.0, work=1.0).report()
    run.meter.add("fetch_bytes", 2**30)
    assert "2.0 GiB fetched since the start" in run.health.late(30.0)


def test_of_several_ranks_the_worst_counts_and_bytes_are_summed():
    good = {"data_wait": 0.0, "seconds": 10.0, "cold": 0.0, "steps": 10.0, "queue": 30.0, "read_count": 5.0,
            "read_p50": 0.001, "retry": 1.0, "cache_hit": 10.0, "fetch_bytes": 0.0}  # fmt: skip
    bad = {**good, "data_wait": 0.5, "queue": 5.0, "read_p50": 0.5, "retry": 2.0, "cache_miss": 10.0,
           "fetch_bytes": 100 * 2**20}  # fmt: skip
    assert figures([good, bad]) == {
        "perf/data_wait": 0.5, "data/queue": 0.5, "data/read_ms_p50": 500.0, "data/retries": 3.0,
        "data/cache_hits": 2 / 3, "data/fetch_mib_per_second": 10.0,
    }  # fmt: skip


def on_rank(ranks):
    """Rank 1 waits and decodes; rank 0 does neither."""
    run = Run(ranks=ranks)
    if ranks.rank == 1:
        run.steps(10, wait=0.5, work=0.5)
    else:
        run.steps(10, wait=0.0, work=1.0, doing="other")
    return run.report()


def test_ranks_agree_on_what_they_report(pool):
    answers = pool.run(on_rank, 2)
    assert answers[0] == answers[1]
    found, said = answers[0]
    assert found["perf/data_wait"] == 0.5
    assert found["data/queue"] == 0
    assert found["data/decode_ms_p50"] == pytest.approx(1000, rel=0.05)
    assert said.startswith("warning: training waits for data 50% of the time on rank 1: decoding")
    assert not any(math.isnan(value) for value in found.values())
