"""What is written about a shard is read back, and nothing in a sidecar can lead a reader astray."""

import contextlib
import os
import struct
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.errors import UserError
from datasets.shards import sidecar
from datasets.shards.grouping import LARGEST, group
from datasets.shards.scan import Members, Scan, scan
from datasets.shards.sidecar import Head, Place, Table

NAMES = ["a.jpg", "a.txt", "a.json", "日本.png", "日本.txt", "c.txt", "d.jpg", "d.png", "e.npy"]


def write(path, members, *, size=1 << 40, mtime=7):
    return sidecar.write(path, Scan(size, 0, members, None), group(members), mtime_ns=mtime)


@pytest.fixture
def shard(tmp_path, pack):
    return pack(tmp_path / "s.tar", [(name, name.encode() * 9) for name in NAMES])


@pytest.fixture
def table(shard, tmp_path):
    found = scan(shard)
    sidecar.write(tmp_path / "s.idx", found, group(found.members), mtime_ns=found.mtime_ns)
    return Table.open(tmp_path / "s.idx")


def test_every_part_is_where_the_table_says(shard, table):
    data = shard.read_bytes()
    assert [table[row].key for row in range(len(table))] == ["a", "日本", "c", "d"]
    assert table[2] == ("c", None, table[2].text, None, None, "")
    assert table[3].fault == "d.jpg and d.png are both its image"
    assert not table[0].fault
    for row in range(len(table)):
        for place in table[row].places:
            payload = data[place.offset : place.offset + place.size]
            assert zlib.crc32(payload) == place.crc
            assert payload.decode().split(".")[0] == table[row].key
    assert (table.bytes, table.mtime_ns) == (len(data), shard.stat().st_mtime_ns)
    for row in (-1, 4):
        with pytest.raises(IndexError):
            table[row]


def test_the_extent_of_rows_holds_them_whole(table):
    assert table.extent(0, 1) == (table[0].image.offset, table[0].record.offset + table[0].record.size)
    assert table.extent(1, 3) == (table[1].image.offset, table[2].text.offset + table[2].text.size)
    assert table.extent(2, 2) == (0, 0)


def test_hashes_of_keys_are_stable(table):
    assert table.key_hashes().tolist()[0] == 3405396810240292928
    assert len(set(table.key_hashes().tolist())) == 4


def test_the_digest_is_of_all_content_and_of_nothing_else(tmp_path, pack):
    def digest(members, **more):
        return write(tmp_path / "x.idx", scan(pack(tmp_path / "x.tar", members)).members, **more).digest

    members = [(name, b"same") for name in NAMES]
    one = digest(members)
    assert one == digest(members, mtime=9)
    others = [
        digest([*members[:-1], ("e.npy", b"SAME")]),
        digest([*members[:-1], ("f.npy", b"same")]),
        digest(members[1:] + members[:1]),
        digest(members, size=1 << 41),
    ]
    assert len({one, *others}) == 5


def test_an_empty_shard_and_offsets_beyond_four_gigabytes(tmp_path):
    write(tmp_path / "none.idx", Members())
    assert len(Table.open(tmp_path / "none.idx")) == 0
    far = Members(["a.jpg", "b.jpg"], [1 << 39, 512], [LARGEST, LARGEST + 1], [2**32 - 1, 0], {})
    write(tmp_path / "far.idx", far)
    table = Table.open(tmp_path / "far.idx")
    assert table[0].image == Place(1 << 39, LARGEST, 2**32 - 1)
    assert table[1].image is None
    assert str(LARGEST) in table[1].fault


def test_a_sidecar_is_small(tmp_path):
    names = [f"{key:09d}.{suffix}" for key in range(10_000) for suffix in ("jpg", "txt", "json")]
    count = len(names)
    write(tmp_path / "x.idx", Members(names, list(range(count)), [1] * count, [0] * count, {}))
    assert (tmp_path / "x.idx").stat().st_size < 70 * 10_000


@pytest.mark.parametrize("content", [b"", b"medleyIX", b"{}", bytes(200)])
def test_what_is_no_sidecar_is_refused(tmp_path, content):
    (tmp_path / "x.idx").write_bytes(content)
    for reading in (Table.open, Head.read):
        with pytest.raises(UserError, match=r"x\.idx is no sidecar .*index its shard again"):
            reading(tmp_path / "x.idx")


def test_a_missing_sidecar_and_one_of_another_version(tmp_path, table):
    with pytest.raises(UserError, match=r"cannot read .*gone\.idx: No such file"):
        Table.open(tmp_path / "gone.idx")
    data = bytearray((tmp_path / "s.idx").read_bytes())
    data[8] = 99
    with pytest.raises(UserError, match="has version 99, not 2"):
        Table.of(bytes(data), "x.idx")


def test_every_cut_and_every_changed_byte_is_found(tmp_path, table):
    data = (tmp_path / "s.idx").read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x40
        for wrong in (bytes(changed), data[:place]):
            with pytest.raises(UserError, match=r"x\.idx (is damaged|is no sidecar|has version)"):
                list(Table.of(wrong, "x.idx"))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_hostile_sidecar_with_right_checksums_never_points_outside(data):
    """Whoever writes a sidecar can make its checksums right."""
    members = Members(["a.jpg", "a.txt", "b.jpg", "b.png"], [0, 10, 20, 30], [10] * 4, [1] * 4, {})
    path = Path(tempfile.gettempdir()) / f"sidecar-{os.getpid()}.idx"
    write(path, members, size=40)
    content = bytearray(path.read_bytes())
    path.unlink()
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(12, len(content) - 1))
        content[place] = data.draw(st.sampled_from([0, 1, 2, 3, 127, 128, 255]) | st.integers(0, 255))
    content[72:76] = struct.pack("<I", zlib.crc32(content[76:]))  # the only block
    content[64:68] = struct.pack("<I", zlib.crc32(content[68:72], zlib.crc32(content[:64])))
    with contextlib.suppress(UserError):
        table = Table.of(bytes(content), "x.idx")
        for row in range(min(len(table), 1000)):
            for place in table[row].places:
                assert place.offset + place.size <= table.bytes
        begin, end = table.extent(0, len(table))
        assert 0 <= begin <= end <= table.bytes
        assert len(table.key_hashes()) == len(table)
