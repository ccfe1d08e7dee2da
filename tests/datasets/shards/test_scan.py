"""One pass over a tar: the same members as `tarfile` where it is whole, a named problem where it is not."""

import gzip
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.errors import UserError
from datasets.shards import scan as scan_module
from datasets.shards.scan import scan

PAIRS = [
    (f"{key:04d}.{suffix}", f"{suffix} of {key}".encode() * 60)
    for key in range(20)
    for suffix in ("jpg", "txt")
]
LAYOUTS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.fixture
def whole(tmp_path, pack):
    return pack(tmp_path / "whole.tar", PAIRS)


def read_by_tarfile(path):
    data = path.read_bytes()
    with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
        return [
            (
                info.name,
                info.offset_data,
                info.size,
                zlib.crc32(data[info.offset_data :][: info.size]),
            )
            for info in tar
        ]


def read_by_us(path):
    found = scan(path)
    assert found.problem is None
    assert found.bytes == path.stat().st_size
    members = found.members
    return list(zip(members.names, members.offsets, members.sizes, members.crcs, strict=True))


def some_path(data):
    path = Path(tempfile.gettempdir()) / f"scan-{os.getpid()}.tar"
    path.write_bytes(data)
    return path


characters = st.characters(exclude_characters="\0/", codec="utf-8")
names = st.lists(
    st.text(characters, min_size=1, max_size=90).filter(lambda n: n not in (".", "..")),
    min_size=1,
    max_size=6,
)
payloads = st.integers(0, 2000) | st.sampled_from([0, 511, 512, 513, 5000])
times = st.sampled_from([0, 1795262166, 1795262166.027354])


@settings(max_examples=150, deadline=None)
@given(
    members=st.lists(st.tuples(names.map("/".join), payloads, times), max_size=8),
    layout=st.sampled_from(LAYOUTS),
    window=st.sampled_from([1024, 4096, 1 << 20]),
)
def test_whole_archives_are_read_as_tarfile_reads_them(members, layout, window):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as tar:
        for number, (name, size, time) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = size, time
            try:
                tar.addfile(info, io.BytesIO(bytes([number + 1]) * size))
            except ValueError:  # too long a name for this layout
                assert layout == tarfile.USTAR_FORMAT
    path = some_path(buffer.getvalue())
    before, scan_module._WINDOW = scan_module._WINDOW, window
    try:
        assert read_by_us(path) == read_by_tarfile(path)
    finally:
        scan_module._WINDOW = before
        path.unlink()


def special(name, kind, **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info, b""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_plain_file_is_named_and_stepped_over(tmp_path, pack, layout):
    members = [
        ("a.jpg", b"image"),
        special("folder", tarfile.DIRTYPE),
        special("b.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"),
        special("c.jpg", tarfile.LNKTYPE, linkname="a.jpg", size=77),
        special("d.jpg", tarfile.CHRTYPE, devmajor=1, devminor=3),
        special("e.jpg", tarfile.FIFOTYPE),
        (special("f.jpg", b"Z")[0], b"of an unknown type" * 50),
        (special("g.jpg", tarfile.CONTTYPE)[0], b"contiguous"),
        ("h.jpg", b"last"),
    ]
    path = pack(tmp_path / "x.tar", members, layout=layout)
    found = scan(path)
    assert [entry[:2] for entry in read_by_us(path)] == [entry[:2] for entry in read_by_tarfile(path)]
    odd = {found.members.names[number]: what for number, what in found.members.odd.items()}
    assert odd == {
        "folder": "a folder",
        "b.jpg": "a link",
        "c.jpg": "a link",
        "d.jpg": "a device or the like",
        "e.jpg": "a device or the like",
        "f.jpg": "a device or the like",
    }
    assert found.members.sizes[-1] == 4


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program")
def test_sparse_files_of_gnu_tar_are_stepped_over(tmp_path):
    with (tmp_path / "s.jpg").open("wb") as file:
        for place in range(1, 40):  # more pieces than a header has room for
            file.seek(place << 16)
            file.write(b"x")
    (tmp_path / "t.jpg").write_bytes(b"after")
    for layout in ("gnu", "posix"):
        path = tmp_path / f"{layout}.tar"
        command = [
            "tar",
            "--sparse",
            f"--format={layout}",
            "-cf",
            str(path),
            "-C",
            str(tmp_path),
            "s.jpg",
            "t.jpg",
        ]
        subprocess.run(command, check=True)
        found = scan(path)
        assert found.problem is None
        assert list(found.members.odd) == [0]
        assert found.members.names[1] == "t.jpg"
        assert found.members.crcs[1] == zlib.crc32(b"after")


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program")
@pytest.mark.parametrize("layout", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_archives_of_the_tar_program_are_read_as_tarfile_reads_them(tmp_path, layout):
    folder = tmp_path / "d/deeper/deeper/deeper"
    folder.mkdir(parents=True)
    for number, name in enumerate(["a.jpg", "b c.txt", "caf\udce9.jpg", "日本.txt", "x" * 90 + ".jpg"]):
        (folder / name).write_bytes(b"x" * 500 * number)
    path = tmp_path / "x.tar"
    command = ["tar", f"--format={layout}", "-cf", str(path), "-C", str(tmp_path), "d"]
    subprocess.run(command, check=layout != "v7", stderr=subprocess.DEVNULL)  # which leaves long names out
    members = read_by_us(path)
    assert members == read_by_tarfile(path)
    assert len(members) > 5


def test_sizes_in_base_256_and_signed_sums_of_old_archivers(tmp_path):
    info = tarfile.TarInfo("caf\xe9.jpg")
    info.size = 5
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT, encoding="latin-1"))
    header[124:136] = bytes([0x80]) + (5).to_bytes(11, "big")
    header[148:156] = b" " * 8
    signed = sum(value - 256 if value > 127 else value for value in header)
    header[148:156] = b"%06o\0 " % signed
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(header) + b"image".ljust(512, b"\0") + bytes(1024))
    assert read_by_us(path) == [("caf\udce9.jpg", 512, 5, zlib.crc32(b"image"))]


def test_a_payload_larger_than_the_window(tmp_path, pack):
    data = os.urandom(9 << 20)
    path = pack(tmp_path / "x.tar", [("a.jpg", data), ("a.txt", b"x")])
    assert [entry[3] for entry in read_by_us(path)] == [zlib.crc32(data), zlib.crc32(b"x")]


def problem(path):
    found = scan(path).problem
    assert found is not None
    return found


def headers(path):
    return [offset - 512 for offset in scan(path).members.offsets]


def test_ten_faults_of_a_container(whole, tmp_path):
    """Those of which webdataset passes over six without a word: each is named, with the place."""
    data, at, path = whole.read_bytes(), headers(whole), tmp_path / "bad.tar"
    jpg, txt = at[20], at[21]
    flipped, zeroed = bytearray(data), bytearray(data)
    flipped[jpg + 3] ^= 0x10
    zeroed[jpg : jpg + 512] = bytes(512)
    cases = {
        "in a payload": (data[: jpg + 600], "truncated", jpg, "it ends in a payload"),
        "in a header": (data[: jpg + 100], "truncated", jpg, "it ends in a header"),
        "at a boundary": (data[:jpg], "truncated", jpg, "it ends without an end mark"),
        "between jpg and txt": (data[:txt], "truncated", txt, "it ends without an end mark"),
        "header byte": (bytes(flipped), "header", jpg, "the header's check sum is wrong"),
        "header zeroed": (bytes(zeroed), "after the end", jpg + 512, "there is more after the end mark"),
        "gz cut off": (
            gzip.compress(data)[:-40],
            "not a tar",
            0,
            "it is not a tar file but gzip: it must be unpacked first",
        ),
        "empty": (b"", "empty", 0, "it is empty"),
        "html": (b"<html>404 not found</html>", "not a tar", 0, "it is not a tar file"),
        "long html": (b"<html>" * 1000, "not a tar", 0, "it is not a tar file"),
        "two in one": (data + data, "after the end", len(data), "there is more after the end mark"),
    }
    for name, (content, kind, offset, reason) in cases.items():
        path.write_bytes(content)
        found = problem(path)
        assert (found.kind, found.offset, found.reason) == (kind, offset, reason), name


def test_every_cut_is_found_or_harmless(whole, tmp_path):
    data, members = whole.read_bytes(), read_by_us(whole)
    end = len(data.rstrip(b"\0"))
    path = tmp_path / "cut.tar"
    for keep in range(0, len(data), 256):
        path.write_bytes(data[:keep])
        if scan(path).problem is None:
            assert keep >= end + 512
            assert read_by_us(path) == members


def test_every_changed_byte_is_found(whole, tmp_path):
    """In a header by its check sum, in a payload by the CRC in the sidecar, in the padding by nobody."""
    data, members = bytearray(whole.read_bytes()), read_by_us(whole)
    path = tmp_path / "flipped.tar"
    for place in range(0, 12 << 10, 7):
        data[place] ^= 0x10
        path.write_bytes(data)
        data[place] ^= 0x10
        within_sum = any(148 <= place - header < 156 for header in headers(whole))
        padding = not any(-512 <= place - offset < size for _, offset, size, _ in members)
        if not (within_sum or padding):
            assert scan(path).problem or read_by_us(path) != members, place


@pytest.mark.parametrize(
    "data", [os.urandom(4096), b"\xff" * 2048, b"BZh91AY&SY", b"PK\x03\x04" + bytes(999)]
)
def test_other_files_are_called_no_tar(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    assert problem(tmp_path / "x.tar").kind == "not a tar"


def pax(records, *, claimed=None):
    """A pax header with these bytes, and a member after it."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = b"x", len(records) if claimed is None else claimed
    member = tarfile.TarInfo("a.jpg")
    padded = records + bytes(-len(records) % 512)
    return info.tobuf(tarfile.GNU_FORMAT) + padded + member.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pax(b"x", claimed=8 << 30), "an extended header of 8589934592 bytes"),
        (pax(b"9999999999 path=x\n"), "the extended header is broken"),
        (pax(b"0 path=x\n"), "the extended header is broken"),
        (pax(b"1" * 100_000), "the extended header is broken"),
        (pax(b"12 size=-512\n"), "the extended header is broken"),
        (pax(b"11 size=1x\n"), "the extended header is broken"),
        (pax(b"8 a=b\n"), "the extended header is broken"),
    ],
)
def test_extended_headers_cannot_claim_what_is_not_there(tmp_path, data, reason):
    first = tarfile.TarInfo("first.jpg").tobuf()
    (tmp_path / "x.tar").write_bytes(first + data)
    found = problem(tmp_path / "x.tar")
    assert (found.kind, found.offset, found.reason) == ("header", 512, reason)


def test_ten_thousand_extended_headers_in_a_row(tmp_path):
    """`tarfile` recurses here."""
    one = pax(b"12 path=abc\n")[:1024]
    (tmp_path / "x.tar").write_bytes(one * 10_000 + pax(b"12 path=def\n"))
    assert read_by_us(tmp_path / "x.tar")[0][0] == "abc"
    (tmp_path / "x.tar").write_bytes(one * 10_000)
    assert problem(tmp_path / "x.tar").reason == "it ends in a header"


def test_a_header_that_points_back_or_renames_all_ends(tmp_path):
    first, info = tarfile.TarInfo("first.jpg").tobuf(), tarfile.TarInfo("a.jpg")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-512).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(first + bytes(header) + bytes(10240))
    assert (problem(tmp_path / "x.tar").offset, problem(tmp_path / "x.tar").reason) == (
        512,
        "the header is broken",
    )
    everywhere = bytearray(pax(b"12 path=abc\n"))
    everywhere[156:157], everywhere[148:156] = b"g", b" " * 8
    everywhere[148:156] = b"%06o\0 " % sum(everywhere[:512])
    (tmp_path / "x.tar").write_bytes(first + bytes(everywhere))
    assert problem(tmp_path / "x.tar").reason == "a header renames or resizes every member"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_bytes_crash_or_hang_it(data):
    """Headers with bytes changed and their sums made right again: a problem or members, no more."""
    layout = data.draw(st.sampled_from(LAYOUTS))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as tar:
        for name, size in (("a" * 40, 300), ("日" * 45 if layout else "b", 700), ("c.jpg", 10)):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = size, 1.5 if layout == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(bytes(size)))
    content = bytearray(buffer.getvalue()[: 10 << 9])
    for _ in range(data.draw(st.integers(1, 4))):
        block = data.draw(st.integers(0, 8)) << 9
        place = data.draw(st.integers(0, 511) | st.sampled_from([124, 134, 135, 156, 345, 482, 504]))
        content[block + place] = data.draw(st.integers(0, 255) | st.sampled_from(list(b"07LKxgSX5")))
        content[block + 148 : block + 156] = b" " * 8
        content[block + 148 : block + 156] = b"%06o\0 " % sum(content[block : block + 512])
    path = some_path(bytes(content))
    found = scan(path)
    path.unlink()
    assert len(found.members) <= 10
    for offset, size in zip(found.members.offsets, found.members.sizes, strict=True):
        assert 0 <= offset <= offset + size <= len(content)


def test_a_shard_that_is_being_written_is_refused(whole, monkeypatch):
    walk = scan_module._walk

    def grows(reader, members):
        with whole.open("ab") as file:
            file.write(bytes(512))
        return walk(reader, members)

    monkeypatch.setattr(scan_module, "_walk", grows)
    with pytest.raises(UserError, match=r"whole\.tar changes while it is read: index it when it is written"):
        scan(whole)


def test_a_shard_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*gone\.tar: No such file"):
        scan(tmp_path / "gone.tar")
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        scan(tmp_path)
