"""`python -m datasets.index` as a user runs it, and that others' shards are read and ours by others."""

import json
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest

from datasets import index
from datasets.index import main
from datasets.shards.manifest import Manifest
from datasets.shards.sidecar import Table
from datasets.testing import BUSY, MISSING, Misstep

ROOT = Path(__file__).resolve().parents[2]
TWO = [("a.jpg", b"image" * 99), ("a.txt", b"text"), ("b.jpg", b"other" * 99), ("b.txt", b"text")]


@pytest.fixture
def shards(tmp_path, pack):
    for number in range(4):
        pack(tmp_path / f"d/{number}.tar", [*TWO, (f"c{number}.txt", b"own")])
    return tmp_path / "d"


def run(capsys, *arguments):
    code = main([*map(str, arguments), "--workers", "2"])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    """In place of processes, which take a second to start; one test has them."""
    spread = index.spread
    monkeypatch.setattr(index, "spread", lambda *jobs, **more: spread(*jobs, **{**more, "processes": False}))


def test_sidecars_beside_and_a_manifest_by_processes(shards):
    command = [sys.executable, "-m", "datasets.index", f"{shards}/*.tar", "--workers", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == f"{shards}/manifest.json\n", done.stderr
    first, second = done.stderr.splitlines()
    assert first.startswith("indexed 4 shards (0.00 GB) in ")
    assert first.endswith(" CPU s/GB")
    manifest = Manifest.load(shards / "manifest.json")
    assert second == f"4 shards, 12 samples, fingerprint {manifest.fingerprint}"
    assert [shard.label for shard in manifest] == ["0.tar", "1.tar", "2.tar", "3.tar"]
    assert sorted(path.name for path in shards.iterdir()) == sorted(
        [*(f"{n}.tar" for n in range(4)), *(f"{n}.tar.idx" for n in range(4)), "manifest.json"]
    )
    for shard in manifest:
        assert (Table.open(Path(shard.sidecar)).digest, len(Table.open(Path(shard.sidecar)))) == (
            shard.digest,
            3,
        )


def test_it_goes_on_where_it_was_stopped(shards, capsys, monkeypatch):
    index_one = index.index_one

    def stops(job):
        if job.url.endswith("2.tar"):
            raise KeyboardInterrupt
        return index_one(job)

    monkeypatch.setattr(index, "index_one", stops)
    code, _, err = run(capsys, f"{shards}/*.tar")
    assert (code, err) == (130, "stopped; the same command goes on from here\n")
    assert not (shards / "manifest.json").exists()
    monkeypatch.setattr(index, "index_one", index_one)
    (shards / "0.tar.idx").exists()
    written = {path: path.stat().st_mtime_ns for path in shards.glob("*.idx")}
    assert written
    code, _, err = run(capsys, f"{shards}/*.tar")
    assert code == 0
    assert f"; {len(written)} were indexed already" in err
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_another_folder_and_shards_of_several(tmp_path, pack, capsys):
    for name in ("x/0", "y/0"):
        pack(tmp_path / f"in/{name}.tar", TWO)
    code, out, _ = run(capsys, f"{tmp_path}/in/*/*.tar", "--out", tmp_path / "out")
    assert (code, out) == (0, f"{tmp_path}/out/manifest.json\n")
    written = sorted((tmp_path / "out").rglob("*.*"))
    assert [str(path.relative_to(tmp_path / "out")) for path in written] == [
        "manifest.json",
        "x/0.tar.idx",
        "y/0.tar.idx",
    ]
    assert not list((tmp_path / "in").rglob("*.idx"))
    assert Manifest.load(tmp_path / "out/manifest.json")[1].sidecar == f"{tmp_path}/out/y/0.tar.idx"


def test_damaged_shards_are_all_named_and_left_out_only_if_asked(shards, capsys):
    for number, keep in ((1, 700), (3, 0)):
        (shards / f"{number}.tar").write_bytes((shards / f"{number}.tar").read_bytes()[:keep])
    code, out, err = run(capsys, f"{shards}/*.tar")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        f"damaged: {shards}/1.tar at byte 0: it ends in a payload (truncated)",
        f"damaged: {shards}/3.tar at byte 0: it is empty (empty)",
        "error: 2 of 4 shards are damaged, and no manifest was written: fetch or pack them again, or leave "
        "them out with --without-damaged",
    ]
    assert not (shards / "manifest.json").exists()
    code, _, err = run(capsys, f"{shards}/*.tar", "--without-damaged")
    assert code == 0
    assert "; 2 were indexed already; 2 damaged ones left out" in err
    manifest = Manifest.load(shards / "manifest.json")
    assert [shard.label for shard in manifest] == ["0.tar", "2.tar"]
    assert [(each.label, each.kind, each.offset) for each in manifest.left_out] == [
        ("1.tar", "truncated", 0),
        ("3.tar", "empty", 0),
    ]
    for number in (0, 2):
        (shards / f"{number}.tar").write_bytes(b"")
    assert run(capsys, f"{shards}/*.tar", "--without-damaged")[0] == 2


def test_other_content_and_unusable_samples_are_said(shards, pack, capsys):
    run(capsys, f"{shards}/*.tar")
    pack(shards / "2.tar", [*TWO, ("a.txt", b"again")])
    code, _, err = run(capsys, f"{shards}/*.tar")
    assert code == 0
    assert f"changed: {shards}/2.tar has other content than when it was indexed before\n" in err
    assert "4 shards, 11 samples, fingerprint " in err
    assert err.endswith("\n1 sample cannot be used: `python -m datasets.check` says why\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{t}/*.tgz"], "no file matches"),
        (["{t}/0.tar", "--workers", "0"], "--workers 0 cannot work"),
        (["{t}/0.tar,{t}/0.tar"], "named twice"),
        (["https://h.example/0.tar"], "is remote: give sidecars and manifest a place, with --out DIR"),
        (["https://h.example/a/../0.tar,https://h.example/1.tar", "--out", "{t}"], "would lead out of"),
        (["{t}/m.json"], "is a manifest: name the shards it was made of"),
        (["{t}/none.tar"], "no sample: one is KEY.jpg"),
        (["{t}/0.tar", "--out", "{t}/0.tar"], "cannot make the folder"),
        (["ftp://h.example/0.tar", "--out", "{t}"], "cannot be read: give"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(shards, pack, capsys, arguments, says):
    pack(shards / "none.tar", [("a.npy", b"x")])
    (shards / "m.json").touch()
    assert main([each.format(t=shards) for each in arguments]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ")
    assert says in err


def test_remote_shards_are_indexed_through_a_file_that_goes(fault_server, tmp_path, pack, capsys):
    for number in range(3):
        pack(fault_server.folder / f"s/{number}.tar", [*TWO, (f"c{number}.txt", b"own")])
    fault_server.script("s/1.tar", BUSY, Misstep(after=1000, then="reset"))
    urls = fault_server.url("s/{0..2}.tar")
    code, out, _ = run(capsys, urls, "--out", tmp_path / "o")
    assert (code, out) == (0, f"{tmp_path}/o/manifest.json\n")
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "0.tar.idx",
        "1.tar.idx",
        "2.tar.idx",
        "manifest.json",
    ]
    manifest = Manifest.load(tmp_path / "o/manifest.json")
    run(capsys, f"{fault_server.folder}/s/*.tar", "--out", tmp_path / "local")
    assert manifest.fingerprint == Manifest.load(tmp_path / "local/manifest.json").fingerprint
    assert manifest[2].url == fault_server.url("s/2.tar")
    assert Table.open(Path(manifest[2].sidecar)).mtime_ns == 0
    fault_server.requests.clear()
    _, _, err = run(capsys, urls, "--out", tmp_path / "o")
    assert "3 were indexed already" in err
    assert {(begin, end) for _, begin, end in fault_server.requests} == {(0, 1)}  # for their sizes
    fault_server.always("s/2.tar", MISSING)
    code, _, err = run(capsys, urls, "--out", tmp_path / "o")
    assert code == 2
    assert "s/2.tar cannot be read: the server said 404" in err


def test_what_webdatasets_writer_wrote_is_read(tmp_path, capsys):
    from webdataset.writer import ShardWriter

    with ShardWriter(str(tmp_path / "%05d.tar"), maxcount=3, verbose=False) as writer:
        for number in range(7):
            writer.write(
                {"__key__": f"{number:04d}", "jpg": b"image", "txt": f"text {number}", "json": {"n": number}}
            )
    assert run(capsys, f"{tmp_path}/*.tar")[0] == 0
    manifest = Manifest.load(tmp_path / "manifest.json")
    assert [shard.samples for shard in manifest] == [3, 3, 1]
    data = Path(manifest[1].url).read_bytes()
    row = Table.open(Path(manifest[1].sidecar))[1]
    assert row.key == "0004"
    assert [data[place.offset : place.offset + place.size] for place in row.places] == [
        b"image",
        b"text 4",
        b'{"n": 4}',
    ]


def test_what_we_read_webdataset_reads_alike(tmp_path, pack, capsys):
    from webdataset.compat import WebDataset

    members = [
        (f"d/{n:03d}.{suffix}", f"{suffix} {n}".encode())
        for n in range(5)
        for suffix in ("jpg", "txt", "json")
    ]
    path = pack(tmp_path / "0.tar", members)
    run(capsys, path)
    data, table = path.read_bytes(), Table.open(tmp_path / "0.tar.idx")
    theirs = list(WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in theirs] == [row.key for row in table]
    for sample, row in zip(theirs, table, strict=True):
        ours = [data[place.offset : place.offset + place.size] for place in row.places]
        assert ours == [sample["jpg"], sample["txt"], sample["json"]]


def test_a_shard_of_img2dataset_is_read(tmp_path, capsys):
    """As its writer makes them: through webdataset, JSON indented, keys of shard and place."""
    from webdataset.writer import TarWriter

    with TarWriter(str(tmp_path / "00003.tar")) as writer:
        for number in range(4):
            image = bytes([number]) * 500
            record = {
                "caption": f"caption {number}",
                "url": "https://h.example/x.jpg",
                "key": f"00003{number:04d}",
                "status": "success",
                "error_message": None,
                "width": 256,
                "height": 256,
                "original_width": 640,
                "original_height": 480,
                "exif": "{}",
                "sha256": sha256(image).hexdigest(),
            }
            sample = {"jpg": image, "txt": record["caption"], "json": json.dumps(record, indent=4)}
            writer.write({"__key__": record["key"], **sample})
    (tmp_path / "00003_stats.json").write_text("{}")
    (tmp_path / "00003.parquet").write_bytes(b"PAR1")
    assert run(capsys, f"{tmp_path}/*.tar")[0] == 0
    table = Table.open(tmp_path / "00003.tar.idx")
    assert [row.key for row in table] == [f"00003{number:04d}" for number in range(4)]
    assert all(row.image and row.text and row.record and not row.fault for row in table)


def test_indexing_needs_no_torch(shards):
    code = (
        "import sys, datasets.index, datasets.check; "
        "sys.exit(bool({'torch', 'webdataset', 'httpx', 'rich'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=300).returncode == 0


def test_a_tar_within_budgets_of_memory(tmp_path):
    """A large member is read through the window."""
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        info = tarfile.TarInfo("a.bin")
        info.size = 1 << 27
        file.write(info.tobuf())
        file.truncate(512 + (1 << 27) + 1024)
    code = (
        "import sys, resource; from pathlib import Path; from datasets.shards.scan import scan; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; found = scan(Path(sys.argv[1])); "
        "print(found.members.sizes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    sizes, kilobytes = done.stdout.rsplit(" ", 1)
    assert sizes == "[134217728]"
    assert int(kilobytes) < 20_000


@pytest.mark.parametrize("name", ["http://h/{0..1}.tar?X-Signature=secret", "s3://b/0.tar?versionId=secret"])
def test_a_url_with_a_query_is_refused(tmp_path, capsys, name):
    code, _, err = run(capsys, name, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "0.tar has a query" in err
    assert "give a URL without one" in err
    assert "secret" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [("{d}/0.tar", "http://h/1.tar"), ("http://h/0.tar", "https://h/1.tar")])
def test_shards_that_share_no_folder_are_refused(shards, tmp_path, capsys, names):
    code, _, err = run(capsys, *(name.format(d=shards) for name in names), "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "1.tar share no folder: index them apart" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("http://h:abc/x.tar", "http://h:abc/x.tar is not written as URLs are"),
        ("http://[::1/x.tar", "http://[::1/x.tar is not written as URLs are"),
        ("~nobody-here/x.tar", "begins with a home folder that is not known"),
    ],
)
def test_names_that_are_not_well_formed(tmp_path, capsys, name, says):
    code, _, err = run(capsys, name, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert says in err
