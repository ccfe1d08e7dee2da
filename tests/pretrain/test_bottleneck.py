"""Which reason is named for slow reading, and which way out, from figures as reading measures them."""

from dataclasses import replace

import pytest

from datasets.health import Meter
from datasets.order import Shuffle
from datasets.remote.fetch import Remote
from pretrain.bottleneck import Setting, Stored, cache_warnings, why_late, why_slow

GIB = 2**30
NOTHING = dict.fromkeys(
    ("read_seconds", "read_count", "read_max", "decode_seconds", "decode_count", "fetch_seconds",
     "fetch_count", "fetch_bytes", "cache_hit", "cache_miss", "retry"), 0.0,
)  # fmt: skip
LOCAL = Setting(threads=2, cores=8)
REMOTE = Setting(
    threads=2,
    cores=8,
    shuffle=Shuffle(window=1 << 19),
    remote=Remote(cache=32.0),
    stored={"web": Stored(size=10**8, bytes=10**8 * 16384)},  # 16 GiB in two windows
)


def measured(**some):
    """Ten seconds of which five were waited."""
    return {**NOTHING, "seconds": 10.0, "waited": 5.0, **some}


DECODING = measured(decode_seconds=19.0, decode_count=500.0, read_seconds=0.5, read_count=1000.0)
MISSING = measured(
    read_seconds=18.0, read_count=1000.0, read_max=2.0, decode_seconds=1.0, cache_hit=300.0, cache_miss=700.0,
    fetch_seconds=60.0, fetch_count=600.0, fetch_bytes=50 * 2**20,
)  # fmt: skip


def test_decoding_asks_for_threads_while_there_are_cores_and_then_for_cores():
    reason, sentence = why_slow(DECODING, LOCAL, fetched=None)
    assert reason == "decoding"
    assert "decoding, 38 ms an image, keeps all reading threads busy" in sentence
    assert "raise --loader-threads, now 2, towards the 8 cores" in sentence
    reason, sentence = why_slow(DECODING, Setting(threads=8, cores=8), fetched=None)
    assert reason == "threads", "eight threads are not kept busy by 19 s of decoding in 10"
    assert "more than 8 cores" in sentence


def test_samples_that_are_neither_read_nor_decoded_are_the_threads_own_work():
    reason, sentence = why_slow(measured(), LOCAL, fetched=None)
    assert reason == "threads"
    assert "the reading threads make samples and batches too slowly: raise --loader-threads" in sentence


def test_slow_storage_is_named_with_its_latency():
    slow = measured(read_seconds=18.0, read_count=450.0, read_max=0.31, decode_seconds=1.0)
    reason, sentence = why_slow(slow, LOCAL, fetched=None)
    assert reason == "storage"
    assert "takes 40 ms on average and 310 ms at most" in sentence


def test_one_read_that_holds_up_everything_is_storage_though_decoding_took_longer():
    stalled = measured(read_seconds=4.0, read_count=1000.0, read_max=3.9, decode_seconds=8.0)
    assert why_slow(stalled, LOCAL, fetched=None)[0] == "storage"


def test_a_network_is_named_with_its_speed_and_what_the_cache_finds():
    reason, sentence = why_slow(MISSING, REMOTE, fetched=None)
    assert reason == "network"
    assert "5.0 MiB/s, a range takes 100 ms on average, and 30% of the reads" in sentence
    assert "raise --remote.connections, now 8" in sentence
    assert "7 were tried again" in why_slow({**MISSING, "retry": 7.0}, REMOTE, fetched=None)[1]


def test_a_cache_too_small_for_the_window_is_the_way_out_that_is_named():
    small = replace(REMOTE, remote=Remote(cache=1.0))
    assert "raise --remote.cache to 16.0" in why_slow(MISSING, small, fetched=None)[1]


def test_a_first_window_that_is_being_fetched_says_how_far_it_is():
    reason, sentence = why_slow(MISSING, REMOTE, fetched=4 * GIB)
    assert reason == "start"
    assert "4.0 GiB so far of at most 16.0 GiB; fetching brings" in sentence
    assert "5.0 MiB/s" in sentence


def test_remote_data_that_are_all_in_the_cache_are_not_the_networks_fault():
    hits = {**MISSING, "cache_hit": 1000.0, "cache_miss": 0.0}
    assert why_slow(hits, REMOTE, fetched=4 * GIB)[0] == "storage"


@pytest.mark.parametrize(("cache", "nodes", "said"), [(16.0, 1, False), (15.9, 1, True), (8.0, 2, False)])
def test_a_cache_is_held_against_two_windows_of_this_machines_share(cache, nodes, said):
    setting = replace(REMOTE, nodes=nodes, remote=Remote(cache=cache))
    assert bool(cache_warnings(setting)) == said


def test_the_warning_has_both_numbers_and_a_window_that_fits():
    (sentence,) = cache_warnings(replace(REMOTE, remote=Remote(cache=3.0)))
    assert "524,288 samples" in sentence
    assert "16.0 GiB" in sentence
    assert "--remote.cache has 3.0 GiB" in sentence
    assert sentence.endswith("--shuffle.window 65536"), "2 GiB; twice as many are 4"


def test_no_smaller_window_is_named_where_none_would_do():
    heavy = {"web": Stored(size=1000, bytes=1000 * GIB)}
    (sentence,) = cache_warnings(Setting(threads=1, cores=1, shuffle=Shuffle(), stored=heavy))
    assert sentence.endswith("raise it")


def test_a_source_smaller_than_its_windows_needs_no_more_than_all_of_it():
    all_of_it = {"web": Stored(size=1000, bytes=30 * GIB)}
    assert cache_warnings(Setting(threads=1, cores=1, stored=all_of_it)) == []
    assert cache_warnings(LOCAL) == []


def test_a_late_step_names_what_is_read_and_fetched_and_why_it_was_tried_again():
    meter = Meter()
    meter.add("retry", reason="the server answered 503")
    with (
        meter.timed("read", "00012.tar"),
        meter.timed("fetch", "http://host/00012.tar"),
        meter.timed("fetch", "http://host/00013.tar"),
    ):
        sentence = why_late(31.0, meter, fetched=2 * GIB, setting=REMOTE)
    assert sentence == (
        "warning: no data for the next step for 31 s: reading 00012.tar for 0 s; fetches under way: 2, the "
        "longest of http://host/00012.tar for 0 s; tried again: 1, the last time because the server answered "
        "503; 2.0 GiB fetched since the start"
    )


def test_a_late_step_that_reads_nothing_says_so():
    sentence = why_late(60.0, Meter(), fetched=0.0, setting=LOCAL)
    assert sentence == (
        "warning: no data for the next step for 60 s: no read is under way: --loader-threads 2 "
        "make samples and batches"
    )


def test_small_windows_need_no_less_for_runs_are_fetched_whole():
    """Windows of an eighth have runs of an eighth, and eight times as many places to fetch from."""
    large, small = REMOTE.window_bytes(1 << 16), REMOTE.window_bytes(1 << 13)
    assert large == small == 2 * 2**16 * 16384
    whole = sum(source.bytes for source in REMOTE.stored.values())
    assert REMOTE.window_bytes(10**9) == whole
