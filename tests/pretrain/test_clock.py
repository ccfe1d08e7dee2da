import math

import pytest

from pretrain.clock import Clock


class Time:
    now = 1000.0

    def __call__(self):
        return self.now


def run(clock, time, steps, *, wait, work, samples=10):
    for _ in range(steps):
        with clock.waiting():
            time.now += wait
        time.now += work
        clock.step(samples)


def test_speed_wait_and_time_left():
    time = Time()
    clock = Clock(now=time)
    run(clock, time, 4, wait=0.5, work=1.5)
    reading = clock.read(remaining=100)
    assert reading.seconds == 8
    assert reading.samples_per_second == 5
    assert reading.data_wait == 0.25
    assert reading.seconds_left == 20
    assert reading.step_seconds_p50 == reading.step_seconds_p99 == 2


def test_the_window_slides_and_the_whole_does_not():
    time = Time()
    clock = Clock(window=5, now=time)
    run(clock, time, 10, wait=0, work=1)
    run(clock, time, 5, wait=3, work=1)
    reading = clock.read(remaining=25)
    assert reading.samples_per_second == 2.5
    assert reading.data_wait == 0.75
    assert reading.seconds_left == 10
    run(clock, time, 1, wait=0, work=14)
    after = clock.read(remaining=0)
    assert after.data_wait == pytest.approx(12 / 30)
    assert (after.step_seconds_p50, after.step_seconds_p99) == (4, 14)


def test_pauses_do_not_count_wherever_they_are():
    time = Time()
    clock = Clock(now=time)
    with clock.pause():
        time.now += 100
    run(clock, time, 2, wait=0.25, work=0.75)
    with clock.pause():
        time.now += 50
        assert clock.read(remaining=0).seconds == 2
    run(clock, time, 2, wait=0.25, work=0.75)
    reading = clock.read(remaining=10)
    assert reading.seconds == 4
    assert reading.samples_per_second == 10
    assert reading.data_wait == 0.25


def test_before_the_first_step_nothing_is_known():
    reading = Clock(now=Time()).read(remaining=10)
    assert reading.samples_per_second == reading.data_wait == 0
    assert math.isinf(reading.seconds_left)


def test_waiting_is_told_in_seconds_and_how_much_of_it_was_cold():
    time = Time()
    clock = Clock(now=time)
    with clock.waiting(cold=True):
        time.now += 5
    clock.step(10)
    run(clock, time, 2, wait=0.5, work=1)
    reading = clock.read(remaining=0)
    assert (reading.seconds, reading.waited, reading.cold) == (8, 6, 5)
