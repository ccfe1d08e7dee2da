import math
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.health import Meter


def test_totals_are_taken_once():
    meter = Meter()
    meter.add("retry")
    meter.add("bytes", 10)
    meter.add("bytes", 5)
    assert meter.take() == {"retry": 1, "bytes": 15}
    assert meter.take() == {}


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=300))
def test_percentiles_are_right_to_five_percent(seconds):
    meter = Meter()
    for each in seconds:
        meter.record("read", each)
    taken, ranked = meter.take(), sorted(seconds)
    assert taken["read_count"] == len(seconds)
    assert taken["read_seconds"] == pytest.approx(sum(seconds))
    for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        exact = ranked[math.ceil(share * len(ranked)) - 1]
        assert taken[f"read_{name}"] == pytest.approx(exact, rel=0.05)


def test_what_raises_is_timed_too():
    meter = Meter()
    with pytest.raises(OSError, match="gone"), meter.timed("read"):
        raise OSError("gone")
    assert meter.take()["read_count"] == 1


def test_threads_lose_nothing():
    meter = Meter()

    def work():
        for _ in range(2000):
            meter.add("bytes", 3)
            with meter.timed("read"):
                pass

    threads = [Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = meter.take()
    assert taken["bytes"] == 8 * 2000 * 3
    assert taken["read_count"] == 8 * 2000
