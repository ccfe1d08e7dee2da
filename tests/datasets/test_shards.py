import gzip
import io
import os
import tarfile

import pytest

from datasets.errors import ContentError, UserError
from datasets.shards import Shard, expand, printable


def pack(path, members, *, layout=tarfile.USTAR_FORMAT):
    """A tar of (name or TarInfo, bytes) members."""
    with tarfile.open(path, "w", format=layout) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


PAIRS = [
    (f"{key:04d}.{suffix}", f"{suffix} of {key}".encode() * 60)
    for key in range(6)
    for suffix in ("jpg", "txt")
]


@pytest.fixture
def whole(tmp_path):
    return pack(tmp_path / "whole.tar", PAIRS)


def keys(path):
    shard = Shard(path)
    shard.close()
    return [entry.key for entry in shard.entries]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_where_they_lie(tmp_path, layout):
    names = [
        "a.jpg",
        "a.txt",
        f"{'deep/' * 18}long.jpg",
        f"{'deep/' * 18}long.txt",
        "b.JPEG",
        "b.json",
        "ignored.npy",
    ]
    if layout != tarfile.USTAR_FORMAT:
        names += [f"{'x' * 300}.png", f"{'x' * 300}.txt", "日本.webp", "日本.txt"]
    shard = Shard(pack(tmp_path / "x.tar", [(name, name.encode() * 200) for name in names], layout=layout))
    assert [member.name for member in shard.members] == names
    for member in shard.members:
        assert shard.read(member) == member.name.encode() * 200
    assert len(shard.entries) == len(names) // 2
    assert not any(entry.fault for entry in shard.entries)
    assert shard.entries[2].record is not None
    assert shard.entries[2].image is not None
    assert shard.entries[2].image.name == "b.JPEG"
    shard.close()


def test_webdatasets_own_writer_is_read(tmp_path):
    from webdataset.writer import TarWriter

    with TarWriter(str(tmp_path / "w.tar")) as writer:
        for key in ("000", "001"):
            writer.write({"__key__": key, "jpg": b"image", "txt": "text", "json": {"a": 1}})
    shard = Shard(tmp_path / "w.tar")
    assert [entry.key for entry in shard.entries] == ["000", "001"]
    assert shard.entries[1].text is not None
    assert shard.read(shard.entries[1].text) == b"text"


def test_dots_folders_and_interleaving_keep_samples_apart(tmp_path):
    names = ["img.000.jpg", "img.001.jpg", "d/img.000.jpg", "img.001.txt", "d/img.000.txt", "img.000.txt"]
    path = pack(tmp_path / "x.tar", [(tarfile_directory("d"), b""), *((name, b"x") for name in names)])
    shard = Shard(path)
    assert [entry.key for entry in shard.entries] == ["img.000", "img.001", "d/img.000"]
    assert not any(entry.fault for entry in shard.entries)


def tarfile_directory(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["a.jpg", "a.txt", "a.jpg", "a.txt"], "a.txt and a.txt are both its text"),
        (["a.jpg", "a.png", "a.txt"], "a.jpg and a.png are both its image"),
        (["a.jpg"], "no .txt, .json or .cls beside its image"),
        (["a.txt"], "no image beside its text"),
    ],
)
def test_what_is_not_one_pair_says_so(tmp_path, names, fault):
    between = [("b.jpg", b"x"), ("b.txt", b"x")]
    members = [(name, b"x") for name in names]
    shard = Shard(pack(tmp_path / "x.tar", [*members[:2], *between, *members[2:]]))
    faults = {entry.key: entry.fault for entry in shard.entries}
    assert faults == {"a": fault, "b": ""}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_never_followed(tmp_path, kind):
    odd = tarfile.TarInfo("a.jpg")
    odd.type, odd.linkname = kind, "/etc/passwd"
    shard = Shard(pack(tmp_path / "x.tar", [("b.jpg", b"x"), ("b.txt", b"x"), (odd, b""), ("a.txt", b"x")]))
    assert shard.entries[1].image is not None
    with pytest.raises(ContentError, match=r"a\.jpg is a (link|special)"):
        shard.read(shard.entries[1].image)


def test_every_cut_is_found_or_harmless(whole, tmp_path):
    """Lenient readers lose samples without a word when a shard ends at or in a header."""
    data = whole.read_bytes()
    end = len(data.rstrip(b"\0"))
    path = tmp_path / "cut.tar"
    for keep in range(0, len(data), 256):
        path.write_bytes(data[:keep])
        try:
            found = keys(path)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert keep >= end + 512
            assert found == keys(whole)


def test_every_changed_header_byte_is_found_or_harmless(whole, tmp_path):
    data = bytearray(whole.read_bytes())
    shard = Shard(whole)
    headers = [member.offset - 512 for member in shard.members]
    path = tmp_path / "flipped.tar"
    found = 0
    for header in (headers[0], headers[5], headers[-1]):
        for place in range(header, header + 512, 5):
            data[place] ^= 0x10
            path.write_bytes(data)
            data[place] ^= 0x10
            try:
                assert keys(path) == keys(whole)
            except UserError:
                found += 1
    assert found > 290  # all but a few bytes around the check sum itself


@pytest.mark.parametrize("member", [0, 5, 11])
def test_zeroed_header_is_found(whole, tmp_path, member):
    shard, data = Shard(whole), bytearray(whole.read_bytes())
    header = shard.members[member].offset - 512
    data[header : header + 512] = bytes(512)
    path = tmp_path / "zeroed.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"zeroed\.tar is damaged at byte .* more after the end mark"):
        keys(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>404 not found</html>",
        b"<html>" * 1000,
        gzip.compress(b"x" * 9999),
        os.urandom(4096),
        b"\xff" * 2048,
    ],
)
def test_other_files_are_called_no_tar(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"x\.tar is not a tar file"):
        keys(tmp_path / "x.tar")


def test_header_that_points_back_ends(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-512).to_bytes(12, "big", signed=True)  # a size in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    first = tarfile.TarInfo("first.jpg").tobuf()
    (tmp_path / "x.tar").write_bytes(first + bytes(header) + bytes(10240))
    with pytest.raises(UserError, match=r"x\.tar is damaged at byte 512 \(a header points back\)"):
        keys(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("names", "holds"),
    [
        (["a.npy", "b.npy", "c.cls"], "2 .npy, 1 .cls members"),
        (["a.jpg", "b.txt"], "1 .jpg, 1 .txt"),
        ([], "nothing"),
    ],
)
def test_shard_without_pairs_is_refused(tmp_path, names, holds):
    path = pack(tmp_path / "x.tar", [(name, b"x") for name in names])
    with pytest.raises(UserError, match=f"x.tar has no image with a text.*holds {holds}"):
        keys(path)


def test_shard_that_shrinks_is_an_error_not_a_masked_sample(whole):
    shard = Shard(whole)
    os.truncate(whole, 5000)
    with pytest.raises(OSError, match="shorter"):
        shard.read(shard.members[-1])


def test_shard_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"cannot open .*gone\.tar: No such file"):
        Shard(tmp_path / "gone.tar")


@pytest.fixture
def tree(tmp_path):
    for name in ("a/00000.tar", "a/00001.tar", "a/00002.tar", "b/00000.tar", "b/odd[1].tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("{t}/a/*.tar", ["a/00000.tar", "a/00001.tar", "a/00002.tar"]),
        ("{t}/a/{{00001..00002}}.tar", ["a/00001.tar", "a/00002.tar"]),
        ("{t}/b/00000.tar, {t}/a/{{00000,00002}}.tar", ["b/00000.tar", "a/00000.tar", "a/00002.tar"]),
        ("{t}/{{b,a}}/00000.tar", ["b/00000.tar", "a/00000.tar"]),
        ("{t}/**/00000.tar", ["a/00000.tar", "b/00000.tar"]),
        ("{t}/b/odd[1].tar", ["b/odd[1].tar"]),
    ],
)
def test_patterns(tree, patterns, names):
    assert expand(patterns.format(t=tree)) == [tree / name for name in names]


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (
            "{t}/a/*.tgz",
            r"no file matches .*\.tgz; the nearest directory that exists is {t}/a, .*holds 00000\.tar",
        ),
        ("{t}/c/d/*.tar", "the nearest directory that exists is {t}, which holds a, b"),
        ("{t}/a/{{00002..00003}}.tar", r"no file matches {t}/a/00003\.tar"),
        ("{t}/a", r"{t}/a is a directory: name the shards in it, as in '{t}/a/\*\.tar'"),
        ("{t}/a/*.tar,{t}/*/00000.tar", r"a/00000\.tar is named twice"),
        ("https://example.org/a.tar", "not a local path"),
        ("{t}/a/*.tar,s3://bucket/{{0..9}}.tar", "s3://bucket/.* is not a local path"),
        ("pipe:cat x; touch y", "not a local path"),
        (" , ", "names no tar file"),
        ("{t}/a/{{0..2.tar", "braces that do not match"),
    ],
)
def test_patterns_that_cannot_be_followed(tree, patterns, says):
    with pytest.raises(UserError, match=says.format(t=tree)):
        expand(patterns.format(t=tree))


def test_names_are_made_printable():
    assert printable("café 日本\n\x1b[2J\udce9") == "café 日本\\n\\x1b[2J\\udce9"
