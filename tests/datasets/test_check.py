"""`python -m datasets.check`: each fault of a container, a sample or a name, with shard and offset."""

import errno
import gzip
import json
import os
import subprocess
import sys
import tarfile
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest

from datasets.check import main
from datasets.index import main as index_main
from datasets.shards.manifest import Manifest
from datasets.shards.spread import spread
from datasets.testing import MISSING

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [
    (f"{key:04d}.{suffix}", f"{suffix} {key}".encode() * 60) for key in range(20) for suffix in ("jpg", "txt")
]


@pytest.fixture(autouse=True)
def _quick(tmp_path, monkeypatch):
    """Threads in place of processes, which take a second to start; one test has them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = partial(spread_by, spread)
    monkeypatch.setattr("datasets.check.spread", threads)
    monkeypatch.setattr("datasets.index.spread", threads)


def spread_by(spread, *jobs, **more):
    return spread(*jobs, **{**more, "processes": False})


@pytest.fixture
def checked(tmp_path, capsys):
    """Checks, and gives the exit code, what was printed, and (kind, shard, key, offset) of each problem."""

    def run(*spec):
        capsys.readouterr()
        code = main([*map(str, spec), "--out", str(tmp_path / "out.json")])
        said = capsys.readouterr()
        content = json.loads((tmp_path / "out.json").read_text())
        found = [(p["kind"], Path(p["shard"]).name, p["key"], p["offset"]) for p in content["problems"]]
        return code, said.out, found

    return run


@pytest.fixture
def indexed(tmp_path, pack):
    path = pack(tmp_path / "d/0.tar", PAIRS)
    pack(tmp_path / "d/1.tar", [(f"x{name}", data) for name, data in PAIRS])
    assert index_main([f"{tmp_path}/d/*.tar"]) == 0
    return path


def test_nothing_wrong_is_said_and_exit_0(indexed, tmp_path, checked):
    for spec in (f"{tmp_path}/d/*.tar", tmp_path / "d/manifest.json"):
        code, out, found = checked(spec)
        assert (code, found) == (0, [])
        assert out.startswith("2 shards, 40 samples, 0.00 GB in ")
        assert out.endswith(": no problems\n")


def test_the_command_as_a_user_runs_it(indexed, tmp_path):
    data = bytearray(indexed.read_bytes())
    data[600] ^= 1
    indexed.write_bytes(data)
    command = [sys.executable, "-m", "datasets.check", f"{tmp_path}/d/manifest.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "checksum (1)",
        f"  {indexed} at byte 512, sample 0000: the bytes of its image are not those that were indexed",
    ]


def test_ten_faults_of_a_container_against_its_sidecar(indexed, checked):
    data = indexed.read_bytes()
    jpg, txt, end = 20 * 1024, 21 * 1024, 40 * 1024
    flipped, zeroed, payload = bytearray(data), bytearray(data), bytearray(data)
    flipped[jpg + 3] ^= 0x10
    zeroed[jpg : jpg + 512] = bytes(512)
    payload[jpg + 512 + 10] ^= 1
    changed = ("changed", "0.tar", "", 0)

    def lost(first, by_text=False):
        keys = [("lost", "0.tar", f"{key:04d}", key * 2048 + 512) for key in range(first, 20)]
        return [("lost", "0.tar", f"{first - 1:04d}", first * 2048 - 512), *keys] if by_text else keys

    cases = {
        "in a payload": (data[: jpg + 600], [("truncated", "0.tar", "", jpg), changed, *lost(10)]),
        "in a header": (data[: jpg + 100], [("truncated", "0.tar", "", jpg), changed, *lost(10)]),
        "at a boundary": (data[:jpg], [("truncated", "0.tar", "", jpg), changed, *lost(10)]),
        "between jpg and txt": (
            data[:txt],
            [("truncated", "0.tar", "", txt), changed, *lost(11, by_text=True)],
        ),
        "header byte": (bytes(flipped), [("header", "0.tar", "", jpg), *lost(10)]),
        "header zeroed": (bytes(zeroed), [("after the end", "0.tar", "", jpg + 512), *lost(10)]),
        "payload byte": (bytes(payload), [("checksum", "0.tar", "0010", jpg + 512)]),
        "gz": (gzip.compress(data)[:-40], [("not a tar", "0.tar", "", 0), changed, *lost(0)]),
        "empty": (b"", [("empty", "0.tar", "", 0), changed, *lost(0)]),
        "html": (b"<html>404 not found</html>" * 99, [("not a tar", "0.tar", "", 0), changed, *lost(0)]),
        "two in one": (data + data, [("after the end", "0.tar", "", len(data)), changed]),
        "one after another": (data[:end] + data, [("duplicate", "0.tar", "0000", end + 512)]),
    }
    for name, (content, expected) in cases.items():
        indexed.write_bytes(content)
        code, _, found = checked(indexed)
        assert code == 1, name
        assert found[: len(expected)] == expected, name


def test_what_img2dataset_hashed_is_compared_where_it_was_stored_unchanged(tmp_path, pack, checked):
    def shard(name, hashed, wrong=()):
        members = []
        for key in range(12):
            image = f"image {key}".encode() * 50
            record = {"key": f"{key}", "sha256": sha256(hashed(image)).hexdigest()}
            stored = image[:-1] + b"?" if key in wrong else image
            members += [
                (f"{key:03d}.jpg", stored),
                (f"{key:03d}.json", json.dumps(record, indent=4).encode()),
            ]
        return pack(tmp_path / name, members)

    code, _, found = checked(shard("kept.tar", bytes, wrong=(3, 11)))
    assert (code, [each[:3] for each in found]) == (
        1,
        [("checksum", "kept.tar", "003"), ("checksum", "kept.tar", "011")],
    )
    assert checked(shard("resized.tar", bytes.upper))[0] == 0


def special(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info, b""


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["a.jpg", "a.txt", "a.txt"], [("duplicate", "a", 2560)]),
        (
            ["a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg"],
            [("duplicate", "a", 4608), ("interleaved", "a", 4608)],
        ),
        (["a.jpg", "a.png"], [("duplicate", "a", 1536)]),
        (["img.0.jpg", "img.0.txt", "img.1.jpg"], [("dots", "img.0", 512), ("dots", "img.1", 2560)]),
        (["a.jpg", "b.jpg", "a.txt", "b.txt"], [("interleaved", "a", 2560), ("interleaved", "b", 3584)]),
        (["a.jpg", "a.seg.png", "a.txt"], []),
        (["../../etc/evil.jpg"], [("name", "", 512)]),
        (["/abs/evil.jpg"], [("name", "", 512)]),
        (["caf\udce9.jpg"], [("name", "", 512)]),
        (["a\nb\x1b[31m.jpg"], [("name", "", 512)]),
        (["a.pyd", "b.pkl", "c.jpg"], [("code", "", 512), ("code", "", 1536)]),
        ([special("a.jpg", tarfile.SYMTYPE), "a.txt"], [("no file", "a", 512)]),
        ([special("a.jpg", tarfile.LNKTYPE)], [("no file", "a", 512)]),
        ([special("a.jpg", tarfile.CHRTYPE)], [("no file", "a", 512)]),
        ([special("dev", tarfile.BLKTYPE)], [("no file", "", 512)]),
        ([special("d.jpg", tarfile.DIRTYPE)], []),
    ],
)
def test_samples_and_names(tmp_path, pack, checked, members, expected):
    listed = [each if isinstance(each, tuple) else (each, b"x") for each in members]
    path = pack(tmp_path / "x.tar", listed)
    code, out, found = checked(path)
    assert sorted(found) == sorted((kind, "x.tar", key, offset) for kind, key, offset in expected)
    assert code == bool(expected)
    assert "1 had no sidecar to compare with" in out
    assert out.isascii()
    assert "\x1b" not in out


def test_damaged_and_missing_sidecars_missing_shards_and_those_left_out(indexed, tmp_path, checked):
    manifest = tmp_path / "d/manifest.json"
    sidecar = tmp_path / "d/1.tar.idx"
    whole = sidecar.read_bytes()
    sidecar.write_bytes(whole[:-1])
    assert checked(manifest)[2] == [("sidecar", "1.tar", "", 0)]
    sidecar.unlink()
    assert checked(manifest)[2] == [("sidecar", "1.tar", "", 0)]
    sidecar.write_bytes((tmp_path / "d/0.tar.idx").read_bytes())
    assert checked(manifest)[2][0] == ("sidecar", "1.tar", "", 0)
    sidecar.write_bytes(whole)
    indexed.rename(tmp_path / "away.tar")
    assert checked(manifest)[2] == [("unreadable", "0.tar", "", 0)]
    indexed.write_bytes(b"")
    assert index_main([f"{tmp_path}/d/*.tar", "--without-damaged"]) == 0
    assert checked(manifest)[2] == [("left out", "0.tar", "", 0)]


def test_remote_shards_are_checked_against_local_or_remote_sidecars(fault_server, pack, checked, tmp_path):
    for number in range(2):
        pack(fault_server.folder / f"{number}.tar", [(f"{number}{name}", data) for name, data in PAIRS])
    index_main([f"{fault_server.folder}/*.tar"])
    assert Manifest.load(fault_server.url("manifest.json"))[1].sidecar == fault_server.url("1.tar.idx")
    assert checked(fault_server.url("manifest.json"))[0] == 0
    path = fault_server.folder / "1.tar"
    data = bytearray(path.read_bytes())
    data[513] ^= 1
    path.write_bytes(data)
    assert checked(fault_server.url("manifest.json"))[2] == [("checksum", "1.tar", "10000", 512)]
    fault_server.always("1.tar", MISSING)
    code, out, found = checked(fault_server.url("manifest.json"))
    assert (code, found) == (1, [("unreadable", "1.tar", "", 0)])
    assert "404" in out


def test_no_room_for_a_remote_shard_is_said(fault_server, pack, tmp_path, monkeypatch, capsys):
    pack(fault_server.folder / "0.tar", PAIRS)
    index_main([f"{fault_server.folder}/*.tar"])
    capsys.readouterr()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for broken in ("datasets.shards.checking.fetch_to", "tempfile.TemporaryDirectory"):
        with monkeypatch.context() as patched:
            patched.setattr(broken, full)
            assert main([fault_server.url("manifest.json")]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: cannot write to the temporary folder {tmp_path} (No space left on dev")
        assert "set TMPDIR" in err
        assert err.count("\n") == 1


def test_names_of_files_that_cannot_be_printed(tmp_path, pack, checked, capsys):
    path = pack(tmp_path / "caf\udce9\x1b[31m.tar", PAIRS)
    assert index_main([str(path)]) == 0
    path.write_bytes(path.read_bytes()[:1000])
    code, out, found = checked(path)
    assert (code, found[0][1]) == (1, path.name)
    assert "/caf\\udce9\\x1b[31m.tar at byte 0: it ends in a payload" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{t}/none*.tar"], "no file matches"),
        (["{t}/x.tar", "--workers", "-1"], "--workers -1 cannot work"),
        (["{t}/x.tar", "--out", "{t}/gone/x.json"], "cannot write"),
        (["{t}/x.json"], "is no manifest"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(tmp_path, pack, capsys, arguments, says):
    pack(tmp_path / "x.tar", PAIRS)
    (tmp_path / "x.json").write_text("{}")
    assert main([each.format(t=tmp_path) for each in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_keys_of_other_shards_are_remarked(indexed, tmp_path, pack, checked):
    pack(tmp_path / "d/2.tar", [("own.txt", b"own"), *PAIRS[4:10]])
    assert index_main([f"{tmp_path}/d/*.tar"]) == 0
    code, out, found = checked(tmp_path / "d/manifest.json")
    assert (code, found) == (1, [("repeated", "2.tar", "0002", 1536)])
    assert (
        f"2.tar at byte 1536, sample 0002: {indexed} has a sample of this key too, and 2 more of its keys in "
        "that or others before it"
    ) in out
