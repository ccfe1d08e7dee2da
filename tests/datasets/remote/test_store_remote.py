import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from fcntl import LOCK_EX, flock
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from typing import Any

import pytest

from datasets.errors import ContentError, ShardError, UserError
from datasets.health import Meter
from datasets.remote.cache import Cache
from datasets.remote.fetch import Remote
from datasets.shards.manifest import Manifest
from datasets.shards.store import Store
from datasets.testing import BUSY, MISSING, RESET, STALL, Misstep

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def served(fault_server, make_shards):
    """Three shards of 130 samples and their manifest, served: 9 runs, some of which two shards share."""
    make_shards(fault_server.folder, shards=3)
    return fault_server


@pytest.fixture
def remote(tmp_path):
    return Remote(folder=str(tmp_path / "cache"), deadline=120.0, stall=60.0)


@pytest.fixture
def open_store(fault_server, remote):
    stores = []

    def opened(**settings):
        manifest = Manifest.load(fault_server.url("manifest.json"))
        stores.append(Store(manifest, remote=replace(remote, **settings), meter=Meter()))
        return stores[-1]

    yield opened
    for store in stores:
        store.close()


def everything(store, folder):
    """All members of all shards, in a shuffled order, with what they should be."""
    found = []
    for number in range(len(store.manifest)):
        table, content = store.table(number), (folder / f"{number:05d}.tar").read_bytes()
        for row in range(len(table)):
            places = (table[row].image, table[row].text)
            found += [(number, place, content[place.offset : place.offset + place.size]) for place in places]
    random.Random(1).shuffle(found)
    return found


def ranges(served):
    return [request for request in served.requests if request[0].endswith(".tar")]


def test_each_run_is_fetched_once_and_then_never(served, open_store):
    store = open_store()
    for number, place, expected in everything(store, served.folder):
        assert store.read(number, place) == expected
    runs = {(0, 0), (0, 1), (0, 2), (1, 2), (1, 3), (1, 4), (2, 4), (2, 5), (2, 6)}
    assert len(ranges(served)) == len(set(ranges(served))) == len(runs)
    taken = store._meter.take()
    assert (taken["cache_miss"], taken["cache_hit"]) == (9, 3 * 260 - 9)
    assert taken["fetch_count"] == 9 + 3  # and three sidecars
    assert taken["read_count"] == 3 * 260

    again, before = open_store(), len(served.requests)
    for number, place, expected in everything(again, served.folder):
        assert again.read(number, place) == expected
    assert [name for name, *_ in served.requests[before:]] == []
    assert "cache_miss" not in again._meter.take()


WEATHER = {
    "reset": RESET,
    "reset in the body": Misstep(after=9000, then="reset"),
    "stall": STALL,
    "burst of 503": BUSY,
    "truncated, length known": Misstep(after=9000),
    "truncated, length unknown": Misstep(after=9000, length=False),
    "wrong range": Misstep(shift=512),
    "wrong byte": Misstep(flip=True),
    "slow": Misstep(pause=0.05),
    "no ranges": Misstep(ranges=False),
}


@pytest.mark.parametrize("misstep", WEATHER.values(), ids=WEATHER)
def test_weather_changes_no_byte(served, open_store, misstep):
    store = open_store(stall=0.5 if misstep.then == "stall" else 60.0)
    wanted = everything(store, served.folder)
    served.script("*", misstep, Misstep(), misstep, misstep, Misstep(), misstep)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda each: store.read(each[0], each[1]), wanted))
    assert read == [expected for *_, expected in wanted]


@pytest.mark.parametrize(
    ("misstep", "message"),
    [
        (MISSING, "00001.tar cannot be read: the server said 404 Not Found"),
        (Misstep(status=403), "00001.tar cannot be read: the server said 403 Forbidden"),
        (RESET, r"00001.tar could not be read within 25 s"),
        (STALL, r"00001.tar could not be read within 25 s: no byte came"),
        (BUSY, r"00001.tar could not be read within 25 s: the server said 503"),
        (Misstep(after=0, length=False), r"00001.tar could not be read within 25 s: the answer ended"),
    ],
)
@pytest.mark.usefixtures("no_pauses")
def test_what_stays_broken_stops_with_the_shard_named(served, open_store, misstep, message):
    store = open_store(deadline=25.0, stall=0.2 if misstep.then == "stall" else 60.0)
    place = store.table(1)[5].image
    served.always("00001.tar", misstep)
    store.prefetch(1, 0, 130)
    with pytest.raises(ShardError, match=message):
        store.read(1, place)
    assert len(ranges(served)) <= 4 * 7  # three pieces were asked for ahead, and then one
    assert store.read(0, store.table(0)[0].image)


def test_a_shard_of_another_size_is_refused(served, open_store):
    store = open_store()
    place = store.table(0)[0].image
    path = served.folder / "00000.tar"
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    with pytest.raises(ShardError, match=r"00000.tar cannot be read: it has \d+ bytes, and had \d+"):
        store.read(0, place)


def test_another_shard_of_that_name_is_refused(served, open_store):
    store = open_store()
    place = store.table(0)[0].image
    (served.folder / "00001.tar").replace(served.folder / "00000.tar")
    with pytest.raises(ShardError, match=r"00000.tar has changed since it was indexed: it holds other bytes"):
        store.read(0, place)


def test_a_wrong_byte_is_the_fault_of_its_sample(served, open_store):
    store = open_store()
    bad, good = store.table(0)[0].image, store.table(0)[1].image
    path = served.folder / "00000.tar"
    content = bytearray(path.read_bytes())
    content[bad.offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(ContentError, match=r"of 00000\.tar are not those indexed"):
        store.read(0, bad)
    assert store.read(0, good) == content[good.offset : good.offset + good.size]


def test_a_cached_file_that_rotted_is_fetched_again(served, open_store, remote):
    store = open_store()
    place = store.table(0)[3].image
    expected = store.read(0, place)
    for path in Path(remote.folder).iterdir():
        if path.stat().st_size > 10_000:  # the runs; sidecars and the ledger are smaller
            path.write_bytes(bytes(path.stat().st_size))
    assert store.read(0, place) == expected


def test_a_sidecar_that_rotted_is_fetched_again(served, open_store, remote):
    store = open_store()
    store.table(0)
    for path in Path(remote.folder).iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert len(open_store().table(0)) == 130
    assert Counter(name for name, *_ in served.requests)["00000.tar.idx"] == 2


def test_what_is_read_ahead_is_fetched_before_it_is_asked_for(served, open_store):
    store = open_store()
    for _ in range(3):
        store.prefetch(0, 0, 130)
        store.prefetch(1, 70, 75)
    until = monotonic() + 120
    while len(store._ahead) and monotonic() < until:
        sleep(0.01)
    fetched = ranges(served)
    assert Counter(name for name, *_ in fetched) == {"00000.tar": 3, "00001.tar": 1}
    for row in range(130):
        store.read(0, store.table(0)[row].image)
    store.read(1, store.table(1)[72].image)
    assert ranges(served) == fetched
    assert "cache_miss" not in store._meter.take()


def test_prefetch_never_raises_and_the_queue_is_bounded(served, open_store, monkeypatch):
    monkeypatch.setattr("datasets.shards.store._WAITING", 2)
    store = open_store(connections=1)
    served.always("*", MISSING)
    for number in (0, 1, 2):
        store.prefetch(number, 0, 130)
        assert len(store._ahead) <= 3
    store.prefetch(0, 5, 5)


def test_readers_wait_for_what_is_being_fetched(served, open_store):
    """A slow range is asked for once, though prefetch and eight readers want it."""
    store = open_store()
    places = [store.table(0)[row].image for row in range(8)]
    served.always("00000.tar", Misstep(pause=0.3))
    store.prefetch(0, 0, 8)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda place: store.read(0, place), places))
    assert len(ranges(served)) == 1


READ_ALL = """
import random, sys
from datasets.shards.manifest import Manifest
from datasets.remote.fetch import Remote
from datasets.shards.store import Store
url, folder, seed = sys.argv[1:]
store = Store(Manifest.load(url), remote=Remote(folder=folder, stall=60.0))
places = [(n, row) for n in range(3) for row in range(130)]
random.Random(int(seed)).shuffle(places)
print("ready", flush=True)
sys.stdin.readline()
print(sum(len(store.read(n, store.table(n)[row].image)) for n, row in places))
"""


def test_two_processes_fetch_each_run_once_between_them(served, remote):
    served.always("*", Misstep(pause=0.03))
    given = [sys.executable, "-c", READ_ALL, served.url("manifest.json"), remote.folder]
    processes: list[Any] = [
        subprocess.Popen(
            [*given, str(seed)], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for seed in (1, 2)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=300)[0].strip() for process in processes] == [str(390 * 300)] * 2
    counts = Counter(served.requests)
    assert len(ranges(served)) == 9
    assert all(count == 1 for (name, *_), count in counts.items() if name != "manifest.json")


def test_a_bounded_cache_gives_the_same_bytes(served, open_store, remote, monkeypatch):
    """Too small for what four threads read: it is fetched again and again, and the bound holds."""
    bound = 120_000  # two runs and a bit; there are nine

    class Small(Cache):
        def __init__(self, folder, *, limit):
            assert limit == 32 * 2**30
            super().__init__(folder, limit=bound)

    monkeypatch.setattr("datasets.remote.ranges.Cache", Small)
    monkeypatch.setattr("datasets.remote.cache._LEDGER_PATIENCE", 600.0)
    store, largest, done = open_store(), [0], []

    def watch():
        over = False
        while not over:
            over, sizes = bool(done), []
            with (Path(remote.folder) / "bytes").open("r+b") as ledger:
                flock(ledger, LOCK_EX)  # whoever makes room or takes it has to wait
                for path in Path(remote.folder).glob("*"):
                    with suppress(FileNotFoundError):
                        sizes.append(path.stat().st_size if path.name != "bytes" else 0)
            largest[0] = max(largest[0], sum(sizes))
            sleep(0.005)

    wanted = everything(store, served.folder)[:200]
    watcher = Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda each: store.read(each[0], each[1]), wanted))
    done.append(True)
    watcher.join()
    assert read == [expected for *_, expected in wanted]
    assert len(ranges(served)) > 9
    assert 0 < largest[0] <= bound


def test_closing_ends_a_reader_that_waits(served, open_store):
    store = open_store(deadline=1000.0)
    place = store.table(0)[0].image
    served.always("00000.tar", BUSY)
    raised = []

    def read():
        with pytest.raises(ShardError, match="reading was stopped") as error:
            store.read(0, place)
        raised.append(error)

    reader = Thread(target=read)
    reader.start()
    while not ranges(served):
        sleep(0.01)
    store.close()
    reader.join(120)
    assert raised


def test_a_manifest_that_is_not_there(served):
    with pytest.raises(UserError, match=r"nothing\.json cannot be read: the server said 404"):
        Manifest.load(served.url("nothing.json"))


def test_images_first_and_texts_last_is_read_too(fault_server, make_shards, open_store, monkeypatch):
    """A sample lies at both ends of its shard: neighbours share pieces, and each is fetched once."""
    monkeypatch.setattr("datasets.remote.runs.PIECE", 32768)
    make_shards(fault_server.folder, shards=3, apart=True)
    store = open_store()
    for number, place, expected in everything(store, fault_server.folder):
        assert store.read(number, place) == expected
    asked = ranges(fault_server)
    assert len(set(asked)) == len(asked)
    assert sum(end - begin for _, begin, end in asked) <= sum(shard.bytes for shard in store.manifest)
