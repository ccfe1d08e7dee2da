import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from datasets.errors import ContentError, ShardError
from datasets.health import Meter
from datasets.shards.manifest import Manifest, Shard
from datasets.shards.sidecar import Place
from datasets.shards.store import Store

ROOT = Path(__file__).resolve().parents[3]


def expected(manifest, number, place):
    with Path(manifest[number].url).open("rb") as file:
        file.seek(place.offset)
        return file.read(place.size)


def places(store, number) -> list[Place]:
    table = store.table(number)
    both = [(table[row].image, table[row].text) for row in range(len(table))]
    return [place for pair in both for place in pair if place is not None]


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def flip(path, offset, count=1):
    with path.open("r+b") as file:
        file.seek(offset)
        before = file.read(count)
        file.seek(offset)
        file.write(bytes(byte ^ 255 for byte in before))


def test_members_are_what_was_packed(tmp_path, make_shards):
    manifest, meter = make_shards(tmp_path), Meter()
    store = Store(manifest, meter=meter)
    for number in range(2):
        for place in places(store, number):
            assert store.read(number, place) == expected(manifest, number, place)
    taken = meter.take()
    assert (taken["read_count"], taken["bytes"]) == (2 * 130 * 2, 2 * 130 * 320)
    store.close()


def test_many_threads_share_few_descriptors(tmp_path, make_shards, monkeypatch):
    """Files are closed and opened again all the time, and no read ever gets another file's bytes."""
    monkeypatch.setattr("datasets.shards.store.allowed", lambda: 2)
    manifest = make_shards(tmp_path, shards=12, samples=8)
    store = Store(manifest)
    wanted = [(number, place) for _ in range(6) for place in range(16) for number in range(12)]
    known = {n: [(place, expected(manifest, n, place)) for place in places(store, n)] for n in range(12)}
    before = descriptors()

    def right(each):
        place, data = known[each[0]][each[1]]
        return store.read(each[0], place) == data

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, wanted))
    assert descriptors() <= before + 2
    store.close()
    assert descriptors() <= before


MANY = """
import os, resource, sys
from pathlib import Path
from datasets.shards.manifest import Manifest
from datasets.shards.store import Store
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
manifest = Manifest.load(Path(sys.argv[1]))
store = Store(manifest)
seen = 0
for number in range(len(manifest)):
    for row in range(2):
        seen += len(store.read(number, store.table(number)[row].image))
greedy = [open(sys.argv[1]) for _ in range(256 - len(os.listdir('/proc/self/fd')))]
seen += sum(len(store.read(number, store.table(number)[0].image)) for number in range(5))
print(len(manifest), seen)
"""


def test_three_thousand_shards_are_read_with_256_descriptors(tmp_path, make_shards):
    """Even when others leave it hardly any."""
    [shard] = make_shards(tmp_path, shards=1, samples=2, size=50)
    shards: list[Shard] = []
    for number in range(3000):
        url = f"{tmp_path}/link{number}.tar"
        os.link(shard.url, url)
        shards.append(replace(shard, url=url))
    Manifest.of(shards).save(tmp_path / "manifest.json")
    command = [sys.executable, "-c", MANY, str(tmp_path / "manifest.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["3000", str((3000 * 2 + 5) * 50)], done.stderr


def test_a_wrong_byte_is_the_fault_of_its_sample(tmp_path, make_shards):
    manifest = make_shards(tmp_path)
    store = Store(manifest)
    bad, *good = places(store, 1)
    flip(tmp_path / "00001.tar", bad.offset + 7)
    with pytest.raises(ContentError, match=r"at 512 of 00001.tar are not those indexed") as raised:
        store.read(1, bad)
    assert raised.value.kind == "checksum"
    assert all(store.read(1, place) == expected(manifest, 1, place) for place in good)


def test_a_byte_that_was_read_wrong_once_is_read_again(tmp_path, make_shards, monkeypatch):
    manifest = make_shards(tmp_path)
    store = Store(manifest)
    place = places(store, 0)[0]
    real, wrong = os.pread, [b"\0" * place.size]
    monkeypatch.setattr(os, "pread", lambda *arguments: wrong.pop() if wrong else real(*arguments))
    assert store.read(0, place) == expected(manifest, 0, place)
    assert not wrong


def test_another_shard_of_that_name_is_refused(tmp_path, make_shards):
    """Of the same size, so that only the bytes tell."""
    store = Store(make_shards(tmp_path))
    wanted = places(store, 0)
    (tmp_path / "00001.tar").replace(tmp_path / "00000.tar")
    with pytest.raises(ShardError, match=r"00000\.tar has changed since .* holds other bytes; put back"):
        store.read(0, wanted[3])


def test_a_shard_that_grew_is_refused(tmp_path, make_shards):
    store = Store(make_shards(tmp_path))
    wanted = places(store, 0)[0]
    with (tmp_path / "00000.tar").open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(ShardError, match=r"00000\.tar has changed since .* has \d+ bytes, not"):
        store.read(0, wanted)


def test_a_shard_cut_short_under_a_reader_is_refused(tmp_path, make_shards):
    store = Store(make_shards(tmp_path))
    *_, last = places(store, 0)
    assert store.read(0, last)
    os.truncate(tmp_path / "00000.tar", last.offset + 3)
    with pytest.raises(ShardError, match=r"00000\.tar has changed since it was indexed: it has"):
        store.read(0, last)


def test_a_shard_that_is_gone_is_named(tmp_path, make_shards):
    store = Store(make_shards(tmp_path))
    wanted = places(store, 1)[0]
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(ShardError, match=r"00001\.tar cannot be read \(No such file"):
        store.read(1, wanted)


def test_what_a_file_server_loses_for_a_moment_is_read_again(tmp_path, make_shards, monkeypatch):
    manifest, meter = make_shards(tmp_path), Meter()
    store = Store(manifest, meter=meter)
    place = places(store, 0)[0]
    monkeypatch.setattr("datasets.shards.store._PAUSES", (0.0, 0.0, 0.0))
    real, trouble = os.pread, [OSError(116, "Stale file handle"), OSError(5, "Input/output error")]

    def pread(*arguments):
        if trouble:
            raise trouble.pop()
        return real(*arguments)

    monkeypatch.setattr(os, "pread", pread)
    assert store.read(0, place) == expected(manifest, 0, place)
    trouble[:] = [OSError(5, "Input/output error")] * 9
    with pytest.raises(ShardError, match=r"00000\.tar cannot be read at byte 512 \(Input/output error\)"):
        store.read(0, place)


def test_a_sidecar_of_another_shard_is_refused(tmp_path, make_shards):
    store = Store(make_shards(tmp_path))
    (tmp_path / "00001.tar.idx").replace(tmp_path / "00000.tar.idx")
    with pytest.raises(ShardError, match=r"00000\.tar\.idx is not of the shard that the manifest names"):
        store.table(0)


def test_tables_used_longest_ago_are_forgotten(tmp_path, make_shards, monkeypatch):
    monkeypatch.setattr("datasets.shards.store._TABLES", 2)
    store = Store(make_shards(tmp_path, shards=4))
    first = store.table(0)
    assert store.table(0) is first
    for number in (1, 2, 3):
        store.table(number)
    assert store.table(0) is not first
    assert len(store.table(0)) == 130


def test_prefetch_of_local_shards_is_nothing(tmp_path, make_shards):
    store = Store(make_shards(tmp_path))
    store.prefetch(0, 0, 130)
    assert len(store._ahead) == 0


def test_the_limit_follows_the_machine():
    from datasets.shards.descriptors import allowed

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 8 <= allowed() <= max(soft // 8, 8)
