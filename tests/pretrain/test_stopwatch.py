"""Parts of a step add up their time; what is rehearsed or judged beside steps is not told."""

import pytest
import torch

from pretrain.distributed import Ranks
from pretrain.health import figures
from pretrain.parallel import wrap
from pretrain.precision import Compute
from pretrain.step import Setup, agree, backward
from pretrain.stopwatch import PARTS, Stopwatch
from pretrain.testing import make_samples, split, tiny_pretrainer

CPU = torch.device("cpu")


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_seconds_are_told_by_part_and_once():
    clock = Time()
    watch = Stopwatch(CPU, now=clock)
    for _ in range(2):
        with watch("forward"):
            clock.now += 1
        with watch("backward"):
            clock.now += 2
        with watch("forward"):
            clock.now += 0.5
        clock.now += 7
    assert watch.take() == {
        "forward": 3, "backward": 4, "optimizer": 0, "wait": 0, "flops": 0, "peak": 0,
    }  # fmt: skip
    assert not any(watch.take().values())


def test_towers_count_in_a_forward_of_training_only():
    pretrainer, watch = tiny_pretrainer(("itc", "lm")), Stopwatch(CPU)
    watch.attach(pretrainer)
    batches = split(make_samples(8), Ranks(rank=0, world=1, device=CPU, group=None), 1)
    pretrainer.model.encode_image(batches[0].images)
    assert "towers" not in watch.take()
    with watch("forward"):
        pretrainer.model.encode_image(batches[0].images)
    spent = watch.take()
    assert 0 < spent["towers"] < spent["forward"]


def slow_on_one(ranks: Ranks, *, slow: int) -> dict[str, float]:
    """The row of this rank after three steps, in which images take 10 ms and on one rank 60 ms."""
    pretrainer, clock = tiny_pretrainer(("itc",), ranks.group), Time()
    watch = Stopwatch(ranks.device, now=clock)
    watch.attach(pretrainer)
    pretrainer.model.image.register_forward_pre_hook(
        lambda *_: clock.spend(0.06 if ranks.rank == slow else 0.01)
    )
    setup = Setup(
        wrapped=wrap(pretrainer, ranks), compute=Compute(device=ranks.device, bf16=False), watch=watch
    )
    batches = split(make_samples(16), ranks, 1)
    for step in range(3):
        counts = agree(setup, batches).counts
        with watch.step(batches):
            backward(setup, batches, {"itc": 1.0 / counts["itc"]}, key=(0, step))
    watch.peak = 1e9
    return {**watch.take(), "seconds": 1.0, "waited": 0.0, "cold": 0.0, "data_wait": 0.0}


def test_the_slow_rank_is_named_though_all_take_equally_long(pool):
    rows = pool.run(slow_on_one, 4, slow=2)
    found = figures(rows)
    assert found["perf/slowest_rank"] == 2
    assert found["perf/slowest_rank_factor"] == pytest.approx(6)
    assert {f"perf/part/{part}" for part in (*PARTS, "data")} < found.keys()
    total = sum(row["flops"] for row in rows)
    assert found["perf/tflops"] == pytest.approx(total / 4 / 1e12)
    assert found["perf/mfu"] == pytest.approx(total / 4 / 1e9)
    assert "perf/slowest_rank" not in figures(rows[:1]), "alone, no one is slow"
