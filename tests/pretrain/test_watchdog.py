"""The watchdog on its own, with steps of milliseconds. Real runs that hang are in test_contract.py."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from datasets.atomic import replace
from datasets.errors import UserError
from pretrain import fencing
from pretrain.clock import Clock
from pretrain.config import Eval
from pretrain.evaluate import during
from pretrain.testing import untrained_judge
from pretrain.watchdog import FENCED, HUNG, Beat, Patience, Watchdog

LEAST = 1.0
PATIENCE = 120.0
"""Seconds within which whatever must come comes, on any machine."""


class Ended:
    """Takes the place of the end of the process."""

    def __init__(self) -> None:
        self.code: int | None = None
        self._event = threading.Event()

    def __call__(self, code: int) -> None:
        self.code = code
        self._event.set()

    def within(self, seconds: float) -> bool:
        return self._event.wait(seconds)


@pytest.fixture
def watch(tmp_path):
    """Starts a watchdog of a rank; the clock that feeds it and how it ended."""
    fencing.hold(tmp_path, "token")
    (tmp_path / "lock").write_text('process 1 on here\n{"token": "token"}\n')
    entered: list[Watchdog] = []

    def start(
        rank: int = 0, world: int = 1, least: float = LEAST, most: float = 60.0, stage: str = ""
    ) -> tuple[Clock, Ended]:
        ended = Ended()
        dog = Watchdog(tmp_path, rank=rank, world=world, least=least, most=most, stage=stage, end=ended)
        entered.append(dog.__enter__())
        return Clock(watch=dog), ended

    yield start
    for dog in entered:
        dog.__exit__()
    fencing.leave(tmp_path, "token")


def steps(clock: Clock, count: int, seconds: float = 0.01) -> None:
    for step in range(count):
        with clock.waiting(cold=step == 0):
            pass
        time.sleep(seconds)
        clock.step(8)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def beat_of(out: Path, rank: int, *, marks: int, doing: str = "in a step", age: float = 0.0) -> None:
    beat = {
        "token": "token",
        "node": f"node{rank}",
        "marks": marks,
        "doing": doing,
        "time": time.time() - age,
    }
    (out / "heartbeats").mkdir(exist_ok=True)
    (out / "heartbeats" / f"rank-{rank}").write_text(json.dumps(beat))


def test_steps_that_end_are_left_alone_and_a_thread_of_its_own_says_so(watch, tmp_path):
    clock, ended = watch()
    for _ in range(20):
        steps(clock, 10)
    assert ended.code is None
    path = tmp_path / "heartbeats" / "rank-0"
    wait_for(lambda: json.loads(path.read_text())["marks"] > 200)
    assert Beat(**json.loads(path.read_text())).token == "token"


def test_whoever_reads_a_sign_of_life_reads_all_of_it(watch, tmp_path):
    watch(least=0.001)  # it builds, and says so all the time
    path = tmp_path / "heartbeats" / "rank-0"
    wait_for(path.exists)
    times = {Beat(**json.loads(path.read_text())).time for _ in range(3000)}
    assert len(times) > 3, "it was written meanwhile"


def test_a_step_that_does_not_end_ends_the_process_with_all_stacks(watch, tmp_path, capsys):
    clock, ended = watch()
    steps(clock, 3)
    with clock.waiting():
        assert ended.within(PATIENCE)
    assert ended.code == HUNG
    said = capsys.readouterr().err
    assert "the run hangs (waiting for data for" in said
    assert "no rank is behind the others" in said
    stacks = (tmp_path / "stacks" / "rank-0.txt").read_text()
    assert stacks.startswith("rank 0 on ")
    assert "in test_a_step_that_does_not_end_ends_the_process_with_all_stacks" in stacks
    assert "in _give_up" in stacks


@pytest.mark.parametrize("silent", [False, True])
def test_the_rank_that_holds_up_the_others_is_named(watch, tmp_path, capsys, monkeypatch, silent):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)  # no sign of life gets older while this machine is busy
    clock, ended = watch(rank=1, world=3)
    steps(clock, 3)
    beat_of(tmp_path, 0, marks=3, age=5000.0 if silent else 0.0, doing="waiting for data")
    beat_of(tmp_path, 2, marks=10, age=-0.5)
    with clock.waiting():
        assert ended.within(PATIENCE)
    said = capsys.readouterr().err
    assert "rank 0 on node0 (" in said
    assert ("no sign of life for 50" if silent else "(waiting for data)") in said
    assert "rank 2 on" not in said


@pytest.mark.parametrize("moment", ["pause", "cold", "first step"])
def test_what_may_take_long_does(watch, moment):
    """An evaluation or a checkpoint, the first batch, and the compilation in the first step."""
    clock, ended = watch()
    if moment == "pause":
        steps(clock, 3)
        with clock.pause():
            assert not ended.within(2 * LEAST)
    elif moment == "cold":
        steps(clock, 3)
        with clock.waiting(cold=True):
            assert not ended.within(2 * LEAST)
    else:
        with clock.waiting(cold=True):
            pass
        assert not ended.within(2 * LEAST)
    clock.step(8)
    assert ended.within(PATIENCE), "after it, steps are timed again"


@pytest.mark.parametrize("moment", ["building", "saving or judging", "waiting for data", "in a step"])
def test_what_may_take_long_may_not_take_for_ever_though_all_give_signs_of_life(
    watch, tmp_path, capsys, moment
):
    clock, ended = watch(most=2 * LEAST)
    if moment == "saving or judging":
        steps(clock, 3)
        with clock.pause():
            assert ended.within(PATIENCE)
    elif moment == "waiting for data":
        with clock.waiting(cold=True):
            assert ended.within(PATIENCE)
    else:
        if moment == "in a step":
            with clock.waiting(cold=True):
                pass
        assert ended.within(PATIENCE)
    assert ended.code == HUNG
    said = capsys.readouterr().err
    assert f"the run hangs ({moment} for " in said
    assert "s, longer than --watchdog.most): no rank is behind the others" in said
    assert "test_watchdog.py" in (tmp_path / "stacks" / "rank-0.txt").read_text()


def test_an_evaluation_may_take_longer_as_long_as_batches_come(watch):
    clock, ended = watch(most=2 * LEAST)
    steps(clock, 3)
    with clock.pause():
        for _ in range(40):
            clock.move()
            assert not ended.within(LEAST / 10)
        assert ended.within(PATIENCE)


def test_where_steps_are_slow_it_waits_ten_of_them(watch):
    clock, ended = watch(least=1.5)
    steps(clock, 4, seconds=0.3)
    assert not ended.within(2.0)
    assert ended.within(PATIENCE)


def test_time_in_which_the_process_was_stopped_does_not_count(watch, monkeypatch):
    """As its thread sees it: it slept for a moment, and an hour has passed."""
    clock, ended = watch(least=3.0)
    steps(clock, 3)
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 3600)
    assert not ended.within(1.5)
    assert ended.within(PATIENCE), "and then it does"


def test_in_a_pause_a_rank_without_a_sign_of_life_is_missed(watch, tmp_path, capsys):
    clock, ended = watch(rank=0, world=2)
    beat_of(tmp_path, 1, marks=3)
    with clock.pause():
        assert ended.within(PATIENCE)
    assert ended.code == HUNG
    assert "rank 1 on node1 (no sign of life for" in capsys.readouterr().err


def test_signs_of_life_of_an_earlier_start_are_nobodys(watch, tmp_path):
    clock, ended = watch(rank=0, world=2)
    beat_of(tmp_path, 1, marks=3)
    path = tmp_path / "heartbeats" / "rank-1"
    path.write_text(path.read_text().replace('"token": "token"', '"token": "old"'))
    with clock.pause():
        assert not ended.within(4 * LEAST)


def test_signs_of_life_of_the_stage_before_put_nobody_behind(watch, tmp_path, capsys):
    clock, ended = watch(rank=0, world=2, stage="two")
    beat_of(tmp_path, 1, marks=1000)
    steps(clock, 3)
    with clock.waiting():
        assert ended.within(PATIENCE)
    said = capsys.readouterr().err
    assert "no rank is behind the others" in said


def test_a_rank_that_was_fenced_off_leaves_also_when_it_hangs(watch, tmp_path, capsys):
    clock, ended = watch()
    before = tmp_path / "heartbeats" / "rank-0"
    wait_for(before.exists)
    steps(clock, 20)
    replace(tmp_path / "lock", b'process 2 on there\n{"token": "other"}\n')
    with clock.pause():
        assert ended.within(PATIENCE)
    assert ended.code == FENCED
    said = capsys.readouterr().err
    assert "was taken over by process 2 on there" in said
    stamp = before.read_text()
    time.sleep(0.2)
    assert before.read_text() == stamp
    assert not (tmp_path / "stacks").exists()


@pytest.mark.parametrize("least", [0.0, -1.0, float("inf"), float("nan")])
def test_a_patience_that_is_no_time_is_refused(least):
    with pytest.raises(UserError, match=r"--watchdog[.]least"):
        Patience(least=least).check()
    with pytest.raises(UserError, match=r"--watchdog[.]most"):
        Patience(most=least).check()


def test_each_batch_of_an_evaluation_is_a_sign_that_it_goes_on():
    """And is asked whether to stop."""
    judge, moves = untrained_judge(), []
    watch: Any = SimpleNamespace(moved=lambda: moves.append(None), mark=lambda *_, **__: None)
    training: Any = SimpleNamespace(
        pretrainer=SimpleNamespace(model=judge.model, objectives={}),
        tokenizer=judge.tokenizer,
        setup=SimpleNamespace(compute=judge.compute),
        run=SimpleNamespace(eval=Eval(batch=8)),
        clock=Clock(watch=watch),
        asked=lambda: len(moves) == 2,
    )
    asked = during.judge_of(training).asked
    assert [asked(), asked()] == [False, True]
    assert len(moves) == 2
