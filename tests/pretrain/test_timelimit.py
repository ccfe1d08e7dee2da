"""When Slurm is asked how long a job may run, and what is made of its answers."""

import math

import pytest

from pretrain import timelimit
from pretrain.timelimit import MARGIN, TimeLimit


@pytest.fixture
def slurm(monkeypatch):
    """A time that passes as it is told to, and what Slurm says of the job."""

    class Slurm:
        now, left, asked = 0.0, math.inf, 0

        def seconds_left(self, job: str) -> float | None:
            assert job == "7"
            self.asked += 1
            return self.left

    slurm = Slurm()
    monkeypatch.setattr(timelimit, "seconds_left", slurm.seconds_left)
    monkeypatch.setattr(timelimit.time, "monotonic", lambda: slurm.now)
    return slurm


def test_it_is_asked_again_shortly_before_the_margin(slurm):
    slurm.left, limit = 400.0, TimeLimit("7")
    assert limit.pause == 0
    assert not limit.is_near()
    assert limit.pause == 400 - MARGIN
    slurm.now, slurm.left = 400 - MARGIN - 1, MARGIN + 1
    assert not limit.is_near()  # too early to ask
    assert slurm.asked == 1
    slurm.now, slurm.left = 400 - MARGIN, MARGIN
    assert limit.is_near()


def test_a_limit_that_is_moved_is_noticed(slurm):
    slurm.left, limit = 86_400.0, TimeLimit("7")
    assert not limit.is_near()
    assert limit.pause == 600
    slurm.now, slurm.left = 600.0, 10.0
    assert limit.is_near()


def test_where_slurm_falls_silent_the_last_answer_counts(slurm):
    slurm.left, limit = 40.0, TimeLimit("7")
    assert not limit.is_near()
    slurm.now, slurm.left = 25.0, None
    assert limit.is_near()


def test_one_that_never_says_is_asked_again_soon_and_none_is_never_near(slurm):
    slurm.left, limit = None, TimeLimit("7")
    assert not limit.is_near()
    assert limit.pause == 30
    slurm.now, slurm.left = 30.0, math.inf
    assert not limit.is_near()
    assert limit.pause == 600
