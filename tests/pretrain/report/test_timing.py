"""What interruptions have cost is compared with what was injected."""

import json

import pytest

from pretrain.report.collect import collect
from pretrain.report.timing import timing

SPEED = 64.0
"""Samples per second: a step of 64 takes one."""


def write(root, reports, starts):
    """Reports and starts at (seconds, step)."""
    lines = [
        {"step": step, "samples": 64 * step, "time": at, "perf/samples_per_second": SPEED}
        for at, step in reports
    ]
    (root / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    rest = {"stage": "one", "lost": 0, "ranks": 1, "device": "cpu"}
    lines = [{"time": at, "step": step, **rest} for at, step in starts]
    (root / "starts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return timing(collect(root))


def test_an_uninterrupted_run_trains_and_does_what_is_beside_it(make_run):
    # 10 s to start, 100 s of steps, 5 s of evaluation before the last report.
    took = write(make_run(), [(60, 50), (115, 100)], [(0, 0)])
    assert took is not None
    assert (took.total, took.training, took.other, took.interrupted) == (115, 100, 15, 0)
    assert took.gaps == (0,)


def test_what_is_lost_and_what_stands_still_is_interrupted(make_run):
    # Step 50 is reported at 50 and the process killed at 70, when it had done 20 steps more; it stands still
    # for 100 s, begins again at step 50 and needs 10 s before its first step.
    took = write(make_run(), [(50, 50), (230, 100)], [(0, 0), (170, 50)])
    assert took is not None
    assert took.interrupted == 20 + 100
    assert (took.total, took.training, took.other) == (230, 100, 10)
    assert took.gaps == (0, 120)


def test_starts_without_a_report_between_them_share_an_interruption(make_run):
    took = write(make_run(), [(50, 50), (260, 100)], [(0, 0), (60, 50), (80, 50), (210, 50)])
    assert took is not None
    assert took.gaps == (0, 10, 20, 130)
    assert (took.interrupted, took.training, took.other) == (160, 100, 0)


def test_a_run_that_failed_before_its_first_report(make_run):
    took = write(make_run(), [(130, 50)], [(0, 0), (80, 0)])
    assert took is not None
    assert (took.interrupted, took.training) == (80, 50)


def test_a_restart_that_has_not_reported_yet_counts(make_run):
    took = write(make_run(), [(50, 50)], [(0, 0), (90, 50)])
    assert took is not None
    assert (took.total, took.interrupted) == (90, 40)


@pytest.mark.parametrize("speed", [SPEED / 10, SPEED * 10])
def test_the_parts_are_never_more_than_the_whole(make_run, monkeypatch, speed):
    monkeypatch.setattr(f"{__name__}.SPEED", speed)
    took = write(make_run(), [(50, 50), (200, 100)], [(0, 0), (150, 50)])
    assert took is not None
    parts = (took.training, took.other, took.interrupted)
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(took.total)


def test_nothing_is_said_of_what_was_not_recorded(make_run):
    assert write(make_run("a"), [], [(0, 0)]) is None
    assert write(make_run("b"), [(50, 50)], []) is None
