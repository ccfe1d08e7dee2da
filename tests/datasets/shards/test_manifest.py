"""The list of shards: columns in memory, JSON on disk, the same fingerprint wherever the data lie."""

import json
import multiprocessing
import os
import time
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from datasets.errors import UserError
from datasets.shards.indexing import cache_folder
from datasets.shards.manifest import LeftOut, Manifest, Shard, open_manifest
from datasets.testing import FaultServer

FOUR = [("a.jpg", b"image"), ("a.txt", b"text"), ("b.jpg", b"other"), ("b.txt", b"text")]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shard(url, **changes):
    told = {"bytes": 10, "samples": 2, "digest": "ab" * 16, "sidecar": f"{url}.idx", "label": ""}
    return Shard(url, **{**told, **changes})


def test_shards_and_samples_are_found_by_number():
    manifest = Manifest.of(
        [shard("/d/x/0.tar", samples=3), shard("/d/x/1.tar", samples=0), shard("/d/y.tar", samples=2)]
    )
    assert (len(manifest), manifest.size, manifest.remote) == (3, 5, False)
    assert [manifest.locate(index) for index in range(5)] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert [manifest.first(number) for number in range(3)] == [0, 3, 3]
    assert manifest[2] == shard("/d/y.tar", label="y.tar")
    assert [each.label for each in manifest] == ["x/0.tar", "x/1.tar", "y.tar"]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            manifest.locate(index)


@pytest.mark.parametrize(
    ("urls", "labels"),
    [
        (["/d/x.tar"], ["x.tar"]),
        (["/d/ab/x.tar", "/d/ac/x.tar"], ["ab/x.tar", "ac/x.tar"]),
        (["https://h/a/0.tar", "https://h/a/1.tar"], ["0.tar", "1.tar"]),
        (["/d/0.tar", "https://h/1.tar"], ["/d/0.tar", "https://h/1.tar"]),
        (["/d/caf\udce9.tar"], ["caf\udce9.tar"]),
    ],
)
def test_labels_begin_where_the_urls_part(urls, labels):
    manifest = Manifest.of(map(shard, urls))
    assert [each.label for each in manifest] == labels
    assert [each.url for each in manifest] == urls
    assert manifest.remote == any("://" in url for url in urls)


def test_a_shard_named_twice_is_refused():
    with pytest.raises(UserError, match=r"/d/a\.tar is named twice: name every shard once"):
        Manifest.of(map(shard, ["/d/a.tar", "/d/b.tar", "/d/a.tar"]))


def test_the_fingerprint_is_of_content_and_order_not_of_place():
    base = [shard("/d/a.tar"), shard("/d/b.tar")]
    one = Manifest.of(base).fingerprint
    assert one == Manifest.of([shard("https://h/a.tar", sidecar="/x"), shard("https://h/b.tar")]).fingerprint
    others = [
        base[::-1],
        base[:1],
        [base[0], shard("/d/c.tar")],
        [base[0], shard("/d/b.tar", bytes=11)],
        [base[0], shard("/d/b.tar", samples=3)],
        [base[0], shard("/d/b.tar", digest="ac" * 16)],
    ]
    assert len({one, *(Manifest.of(other).fingerprint for other in others)}) == 7


def test_differences_are_told_in_words():
    then = Manifest.of([shard(f"/d/{n}.tar") for n in range(9)])
    assert then.difference(Manifest.of([shard(f"/e/{n}.tar") for n in range(9)])) == ""
    changed = [shard(f"/d/{n}.tar", bytes=20 if n < 5 else 10) for n in range(12)]
    assert then.difference(Manifest.of(changed)) == (
        "0.tar (bytes 10 then, 20 now); 1.tar (bytes 10 then, 20 now); 2.tar (bytes 10 then, 20 now); "
        "2 more changed; 3 shards new: 10.tar, 11.tar, 9.tar"
    )
    fewer = Manifest.of(shard(f"/d/{n}.tar") for n in range(8))
    assert then.difference(fewer) == "1 shard gone: 8.tar"
    turned = Manifest.of(shard(f"/d/{n}.tar") for n in range(8, -1, -1))
    assert then.difference(turned) == "the shards stand in another order"
    other = Manifest.of(shard(f"/d/{n}.tar", digest=("cd" if n == 4 else "ab") * 16) for n in range(9))
    assert then.difference(other) == "4.tar (other content of the same size)"


def test_a_folder_with_its_manifest_can_be_moved_and_served(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    left = [LeftOut("sub/9.tar", "truncated", 512, "it ends in a header")]
    here = [shard(f"{folder}/sub/{n}.tar", sidecar=f"{folder}/{n}.idx") for n in range(2)]
    made = Manifest.of(here, left_out=left)
    made.save(folder / "manifest.json")
    assert list(Manifest.load(folder / "manifest.json")) == list(made)
    assert Manifest.load(folder / "manifest.json").left_out == tuple(left)
    folder.rename(tmp_path / "there")
    moved = Manifest.load(tmp_path / "there" / "manifest.json")
    assert moved.fingerprint == made.fingerprint
    assert moved[1].url == f"{tmp_path}/there/sub/1.tar"
    assert moved[1].sidecar == f"{tmp_path}/there/1.idx"
    with FaultServer(tmp_path / "there") as server:
        served = Manifest.load(server.url("manifest.json"))
        assert served.fingerprint == made.fingerprint
        assert served[1].url == server.url("sub/1.tar")
        assert served[1].sidecar == server.url("1.idx")
        assert served.remote


def test_shards_elsewhere_are_named_in_full(tmp_path):
    made = Manifest.of([shard("https://h/0.tar", sidecar=f"{tmp_path}/0.tar.idx"), shard("https://h/1.tar")])
    made.save(tmp_path / "manifest.json")
    loaded = Manifest.load(tmp_path / "manifest.json")
    assert [each.url for each in loaded] == ["https://h/0.tar", "https://h/1.tar"]
    assert [each.sidecar for each in loaded] == [f"{tmp_path}/0.tar.idx", "https://h/1.tar.idx"]


@pytest.mark.parametrize(
    "urls",
    [
        ["{here}/0.tar", "{here}/1.tar"],
        ["{here}/sub/0.tar", "{here}/sub/1.tar"],
        ["/elsewhere/0.tar", "{here}/1.tar"],
        ["https://h/a/0.tar", "https://h/a/1.tar"],
        ["https://h/0.tar", "https://other/1.tar"],
        ["{here}/0.tar", "https://h/1.tar"],
        ["http://h/0.tar", "https://h/1.tar"],
        ["s3://b/0.tar", "http://h/1.tar", "/d/2.tar"],
    ],
)
def test_every_root_is_the_same_after_saving(tmp_path, urls):
    made = Manifest.of(shard(url.format(here=tmp_path)) for url in urls)
    made.save(tmp_path / "manifest.json")
    loaded = Manifest.load(tmp_path / "manifest.json")
    assert list(loaded) == list(made)
    assert loaded.fingerprint == made.fingerprint
    assert loaded.remote == made.remote == any("://" in url for url in urls)


def test_whole_labels_need_no_root_to_be_local():
    paths = ["/d/0.tar", "/e/1.tar"]
    rootless = Manifest("", paths, bytes=[1, 1], samples=[1, 1], digests=bytes(32))
    assert not rootless.remote
    assert [each.url for each in rootless] == paths


def test_a_manifest_that_came_by_network_names_no_local_files(tmp_path):
    Manifest.of([shard("/etc/passwd")]).save(tmp_path / "manifest.json")
    with (
        FaultServer(tmp_path) as server,
        pytest.raises(UserError, match="came by network and names /etc/ here"),
    ):
        Manifest.load(server.url("manifest.json"))


def damaged(tmp_path, **changes):
    Manifest.of([shard("/d/0.tar"), shard("/d/1.tar")]).save(tmp_path / "manifest.json")
    content = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**content, **changes}))
    return tmp_path / "manifest.json"


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"labels": ["0.tar"]},
        {"labels": [1, 2]},
        {"labels": None},
        {"bytes": [1, -2]},
        {"bytes": [1, 2**80]},
        {"samples": [1, 2.5]},
        {"samples": [2, 3]},
        {"digests": "ab"},
        {"digests": "xy" * 32},
        {"sidecars": ["x"]},
        {"left_out": [[1]]},
        {"root": 3},
        {"root": None},
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, changes):
    with pytest.raises(
        UserError, match=r"manifest\.json is no manifest, or damaged .*python -m datasets\.index"
    ):
        Manifest.load(damaged(tmp_path, **changes))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, '{"format": "medley manifest 1"}', "\x00\xff"]
)
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(UserError, match=r"m\.json is no manifest"):
        Manifest.load(tmp_path / "m.json")
    with pytest.raises(UserError, match=r"cannot read .*gone\.json"):
        Manifest.load(tmp_path / "gone.json")


def test_a_billion_and_a_half_samples_are_a_few_megabytes(tmp_path):
    Manifest.synthetic(150_000, 10_000).save(tmp_path / "m.json")
    started = time.process_time()
    manifest = Manifest.load(tmp_path / "m.json")
    assert time.process_time() - started < 2  # 0.2 s on an idle machine
    assert manifest.size == 1_500_000_000
    assert manifest.locate(1_234_567_890) == (123_456, 7890)
    assert manifest[149_999].label == "149999.tar"
    stored = [
        manifest._labels._all,
        manifest._labels._ends,
        manifest._sidecars._all,
        manifest._sidecars._ends,
    ]
    stored += [manifest._bytes, manifest._ends, manifest._digests]
    assert sum(memoryview(each).nbytes for each in stored) < 12e6


def test_local_shards_are_indexed_on_first_use_and_not_again(tmp_path, pack, monkeypatch):
    for number in range(3):
        pack(tmp_path / f"d/{number}.tar", FOUR)
    said = []
    first = open_manifest(f"{tmp_path}/d/*.tar", say=said.append)
    assert said[0] == f"indexing 3 shards of {tmp_path}/d on first use"
    assert (len(first), first.size) == (3, 6)
    assert len(list(cache_folder().iterdir())) == 3  # and no locks are left
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["0.tar", "1.tar", "2.tar"]
    monkeypatch.setattr("datasets.shards.indexing.scan", None)
    again = open_manifest(f"{tmp_path}/d/*.tar", say=said.append)
    assert (again.fingerprint, len(said)) == (first.fingerprint, 2)


def test_a_shard_that_changed_under_its_sidecar_is_refused(tmp_path, pack):
    """Whoever wrote a sidecar beside a shard said what it holds; what was indexed by the way says less."""
    path = pack(tmp_path / "d/0.tar", FOUR)
    beside = tmp_path / "d/0.tar.idx"
    before = open_manifest(str(path))
    Path(before[0].sidecar).rename(beside)
    assert open_manifest(str(path))[0].sidecar == str(beside)
    told = beside.read_bytes()
    os.utime(path)
    assert open_manifest(str(path)).fingerprint == before.fingerprint  # touched, and the same
    pack(path, [*FOUR, ("c.txt", b"more")])
    for _ in range(2):  # also when it has been looked at already
        with pytest.raises(UserError, match=r"0\.tar has other content than when it was indexed: put back"):
            open_manifest(str(path))
    assert beside.read_bytes() == told
    beside.write_bytes(b"another program's")
    after = open_manifest(str(path))
    assert before.difference(after) == "0.tar (samples 2 then, 3 now)"
    assert after[0].sidecar.startswith(str(cache_folder()))
    assert beside.read_bytes() == b"another program's"


def test_a_damaged_sidecar_is_written_again(tmp_path, pack):
    path = pack(tmp_path / "d/0.tar", FOUR)
    first = open_manifest(str(path))
    Path(first[0].sidecar).write_bytes(b"medleyIX" + bytes(50))
    assert list(open_manifest(str(path))) == list(first)


def test_read_only_folders_are_left_alone_and_said(tmp_path, pack, monkeypatch):
    path = pack(tmp_path / "d/0.tar", FOUR)
    sealed = tmp_path / "sealed"
    sealed.mkdir()
    sealed.chmod(0o555)
    monkeypatch.setenv("XDG_CACHE_HOME", str(sealed))
    with pytest.raises(UserError, match=r"cannot write .*sealed.*(--out DIR`, or set XDG_CACHE_HOME)"):
        open_manifest(str(path))


def open_in_process(spec, indexed):
    manifest = open_manifest(spec, say=indexed.put)
    indexed.put(manifest.fingerprint)


def test_several_processes_index_each_shard_once(tmp_path, pack, monkeypatch):
    """Those that come second wait, find the sidecar, and do nothing."""
    for number in range(4):
        pack(tmp_path / f"d/{number}.tar", FOUR)
    monkeypatch.setattr("datasets.shards.indexing.scan", slow_scan(tmp_path))
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    spec = f"{tmp_path}/d/*.tar"
    processes = [context.Process(target=open_in_process, args=(spec, said)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    # One that comes when all is done has nothing else to say.
    lines = iter(partial(said.get, timeout=120), None)
    fingerprints = list(islice((line for line in lines if len(line) == 32), len(processes)))
    assert len(set(fingerprints)) == 1
    assert len((tmp_path / "scanned").read_text().split()) == 4


def slow_scan(tmp_path):
    from datasets.shards.scan import scan

    def counted(path):
        with (tmp_path / "scanned").open("a") as file:
            file.write(f"{path}\n")
        time.sleep(0.1)
        return scan(path)

    return counted


def test_damaged_shards_are_all_found_and_the_first_named(tmp_path, pack):
    for number in range(6):
        path = pack(tmp_path / f"d/{number}.tar", FOUR)
        if number % 2:
            os.truncate(path, 700)
    with pytest.raises(
        UserError, match=r"3 shards are damaged: \S*1\.tar at byte 0 \(truncated: .*without-damaged"
    ):
        open_manifest(f"{tmp_path}/d/*.tar")


@pytest.mark.parametrize(
    ("names", "holds"),
    [(["a.npy", "b.npy", "c.mp4"], r"2 \.npy, 1 \.mp4 members"), ([], "nothing")],
)
def test_shards_without_samples_are_refused_with_what_they_hold(tmp_path, pack, names, holds):
    path = pack(tmp_path / "d/0.tar", [(name, b"x") for name in names])
    with pytest.raises(UserError, match=rf"has no samples: a sample is KEY\.jpg .*0\.tar holds {holds}"):
        open_manifest(str(path))


def test_remote_shards_need_a_manifest():
    with pytest.raises(
        UserError, match=r"has no manifest: .*datasets\.index 'https://h\.example/0\.tar' --out DIR"
    ):
        open_manifest("https://h.example/{0..9}.tar?signature=secret")


@pytest.mark.parametrize("name", ["http://h:abc/{}", "http://[::1/{}"])
def test_a_malformed_url_is_refused_in_words(name):
    with pytest.raises(UserError, match=r"m\.json is not written as URLs are"):
        open_manifest(name.format("m.json"))
    with pytest.raises(UserError, match=r"x\.tar is remote and has no manifest"):
        open_manifest(name.format("x.tar"))


def test_manifests_and_shards_are_pooled_in_the_order_named(tmp_path, pack):
    for name in ("a/0", "a/1", "b/0"):
        pack(tmp_path / f"{name}.tar", [*FOUR, (f"{name[0]}{name[2]}.txt", b"own")])
    open_manifest(f"{tmp_path}/a/*.tar").save(tmp_path / "a/manifest.json")
    pooled = open_manifest(f"{tmp_path}/b/0.tar,{tmp_path}/a/manifest.json")
    assert [each.label for each in pooled] == ["b/0.tar", "a/0.tar", "a/1.tar"]
    with pytest.raises(UserError, match=r"a/0\.tar is named twice"):
        open_manifest(f"{tmp_path}/a/manifest.json,{tmp_path}/a/0.tar")


def test_a_thousand_indexed_shards_open_by_their_headers(tmp_path, pack):
    path = pack(tmp_path / "d/0.tar", FOUR)
    for number in range(1, 1000):
        os.link(path, tmp_path / f"d/{number}.tar")
    open_manifest(f"{tmp_path}/d/*.tar")
    started = time.process_time()
    assert open_manifest(f"{tmp_path}/d/*.tar").size == 2000
    assert time.process_time() - started < 1  # 0.1 s on an idle machine
