"""s3:// against a real S3 protocol on the loopback device, and a file system that fails by a script."""

import random
import sys
import threading
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import ClassVar

import fsspec
import pytest
from fsspec.registry import _registry

from datasets.errors import ShardError, UserError
from datasets.health import Meter
from datasets.remote import buckets
from datasets.remote.fetch import Remote, fetch, fetch_to, read_whole, size_of
from datasets.shards.manifest import Manifest
from datasets.shards.store import Store

CONTENT = random.Random(1).randbytes(300_000)
QUICK = Remote(deadline=120.0, stall=60.0)


@pytest.fixture
def bucket(monkeypatch):
    """A server of S3 with the bucket `shards`."""
    server = pytest.importorskip("moto.server")
    import s3fs

    served = server.ThreadedMotoServer(port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    buckets._find.cache_clear()
    system = s3fs.S3FileSystem()
    system.makedirs("shards", exist_ok=True)
    yield system
    s3fs.S3FileSystem.clear_instance_cache()
    served.stop()


def test_objects_of_s3(bucket, tmp_path):
    bucket.pipe("shards/a.tar", CONTENT)
    url = "s3://shards/a.tar"
    assert size_of(url, remote=QUICK) == len(CONTENT)
    assert fetch(url, 1000, 250_000, remote=QUICK, size=len(CONTENT)) == CONTENT[1000:250_000]
    assert read_whole(url, remote=QUICK) == CONTENT
    assert fetch_to(url, tmp_path / "copy", remote=QUICK) == len(CONTENT)
    assert (tmp_path / "copy").read_bytes() == CONTENT
    with pytest.raises(ShardError, match=r"s3://shards/b.tar cannot be read: there is no such object"):
        fetch("s3://shards/b.tar", 0, 10, remote=QUICK)
    with pytest.raises(ShardError, match="it has 300000 bytes, and had 5 when it was indexed"):
        fetch(url, 0, 5, remote=QUICK, size=5)


def test_shards_of_s3(bucket, tmp_path, make_shards):
    manifest = make_shards(tmp_path / "local")
    for path in (tmp_path / "local").iterdir():
        bucket.pipe(f"shards/set/{path.name}", path.read_bytes())
    remote = Remote(folder=str(tmp_path / "cache"), deadline=120.0, stall=60.0)
    there = Store(Manifest.load("s3://shards/set/manifest.json"), remote=remote)
    here = Store(manifest)
    assert there.manifest.fingerprint == manifest.fingerprint
    for number in range(2):
        there.prefetch(number, 0, 130)
        for row in range(130):
            place = here.table(number)[row].image
            assert place is not None
            assert there.read(number, place) == here.read(number, place)
    there.close()


def test_an_object_that_shrank_is_refused(bucket):
    bucket.pipe("shards/a.tar", CONTENT)
    assert fetch("s3://shards/a.tar", 0, 300_000, remote=QUICK, size=300_000) == CONTENT
    bucket.pipe("shards/a.tar", CONTENT[:1000])
    for begin in (0, 5000):
        with pytest.raises(ShardError, match="it has 1000 bytes, and had 300000 when it was indexed"):
            fetch("s3://shards/a.tar", begin, 300_000, remote=QUICK, size=300_000)


class Moody(fsspec.AbstractFileSystem):
    """One object, and what happens on each call in turn."""

    protocol = ("s3", "gs")
    cachable = False
    moods: ClassVar[list] = []
    over: ClassVar[Event]

    def info(self, path, **_):
        return {"name": path, "size": len(CONTENT), "type": "file"}

    def cat_file(self, path, start=None, end=None, **_):
        mood = self.moods.pop(0) if self.moods else None
        if isinstance(mood, Exception):
            raise mood
        if mood == "hang":
            self.over.wait()
        return CONTENT[start:end][: mood if isinstance(mood, int) else None]


class NoCredentialsError(Exception):
    pass


@pytest.fixture
def moody(monkeypatch):
    monkeypatch.setattr(buckets, "_BLOCK", 100_000)
    monkeypatch.setattr(Moody, "moods", [])
    monkeypatch.setattr(Moody, "over", Event(), raising=False)
    for scheme in ("s3", "gs"):
        monkeypatch.setitem(_registry, scheme, Moody)
    buckets._find.cache_clear()
    yield Moody
    Moody.over.set()
    for thread in threading.enumerate():  # what hung
        if thread.name == "bucket":
            thread.join(60)
    buckets._find.cache_clear()


def meeting(mood):
    """Who is slow is not taken for one that hangs, but where that is what it does."""
    return replace(QUICK, stall=0.3) if mood == "hang" else QUICK


@pytest.mark.parametrize(
    "mood",
    [OSError("reset"), RuntimeError("of the library"), TimeoutError(), 0, 70_000, "hang"],
    ids=["reset", "its own error", "timeout", "nothing", "truncated", "hang"],
)
def test_what_passes_changes_nothing(moody, mood):
    meter = Meter()
    moody.moods[:] = [None, mood, mood]
    got = fetch("s3://b/a.tar", 1000, 290_000, remote=meeting(mood), meter=meter, size=len(CONTENT))
    assert got == CONTENT[1000:290_000]
    retries = meter.take()["retry"]
    assert retries == 2 or (mood == "hang" and retries > 2)


@pytest.mark.parametrize("mood", [OSError("reset"), 0, "hang"], ids=["reset", "nothing", "hang"])
@pytest.mark.usefixtures("no_pauses")
def test_what_does_not_pass_is_given_up_in_time(moody, mood):
    moody.moods[:] = [mood] * 100
    meter, remote = Meter(), replace(meeting(mood), deadline=25.0)
    with pytest.raises(ShardError, match=r"s3://b/a.tar could not be read within 25 s: "):
        fetch("s3://b/a.tar", 0, 1000, remote=remote, meter=meter)
    assert meter.take()["retry"] == 6


@pytest.mark.parametrize(
    ("mood", "message"),
    [
        (FileNotFoundError("b/a.tar"), "there is no such object"),
        (PermissionError("Forbidden"), r"access is refused \(Forbidden\)"),
        (NoCredentialsError("Unable to locate"), r"there are no credentials \(Unable to locate\)"),
    ],
)
def test_a_refusal_is_final(moody, mood, message):
    moody.moods[:] = [mood]
    with pytest.raises(ShardError, match=rf"s3://b/a.tar cannot be read: {message}"):
        fetch("s3://b/a.tar", 0, 1000, remote=QUICK)
    assert not moody.moods


def test_objects_of_google(moody):
    assert fetch("gs://b/a.tar", 1000, 290_000, remote=QUICK, size=len(CONTENT)) == CONTENT[1000:290_000]
    assert size_of("gs://b/a.tar", remote=QUICK) == len(CONTENT)


def test_a_missing_library_is_named(monkeypatch):
    buckets._find.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs:// needs gcsfs: install it with `pip install -e '.\[remote\]'`"):
        fetch("gs://b/a.tar", 0, 10, remote=QUICK)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UserError, match=r"s3:// needs s3fs: install it with"):
        fetch("s3://b/a.tar", 0, 10, remote=QUICK)
    assert "remote = " in (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()
