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


def test_what_is_under_way_is_known_until_it_ends_however_it_ends():
    meter = Meter()
    assert meter.running() == []
    with meter.timed("read", "00001.tar"):
        with meter.timed("fetch", "http://host/00001.tar"):
            first, second = meter.running()
        with pytest.raises(OSError, match="gone"), meter.timed("decode", "00001.tar/1"):
            raise OSError("gone")
        assert [each.name for each in meter.running()] == ["read"]
    assert (first.name, first.what) == ("read", "00001.tar")
    assert (second.name, second.what) == ("fetch", "http://host/00001.tar")
    assert first.seconds >= second.seconds >= 0
    assert meter.running() == []


def test_a_total_can_be_seen_without_being_taken():
    meter = Meter()
    assert meter.told("retry") == (0, "")
    meter.add("retry", reason="it was busy")
    meter.add("retry")
    assert meter.told("retry") == meter.told("retry") == (2, "it was busy")
    assert meter.take() == {"retry": 2}
    assert meter.told("retry") == (0, "")
