import io
import random
import tarfile
import threading
from types import SimpleNamespace

import pytest

from datasets.shards.grouping import group
from datasets.shards.manifest import Manifest, Shard
from datasets.shards.scan import scan
from datasets.shards.sidecar import write
from datasets.testing import FaultServer


@pytest.fixture(scope="session")
def pack():
    """Writes a tar of (name or TarInfo, bytes) members and returns its path."""

    def write(path, members, *, layout=tarfile.USTAR_FORMAT):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=layout) as tar:
            for name, data in members:
                info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
                info.size = len(data) or info.size
                tar.addfile(info, io.BytesIO(data) if data else None)
        return path

    return write


@pytest.fixture(scope="session")
def make_shards(pack):
    """Write indexed shards of random bytes into a folder; gives their manifest, saved there too."""

    def make(folder, *, shards=2, samples=130, size=300, apart=False):
        parts = (("jpg", size), ("txt", 20))
        names = [(f"{each:05d}.{suffix}", length) for each in range(samples) for suffix, length in parts]
        if apart:  # all images before all texts
            names.sort(key=lambda name: (name[0].rpartition(".")[2], name))
        indexed = []
        for number in range(shards):
            members = ((name, random.Random(f"{number} {name}").randbytes(length)) for name, length in names)
            indexed.append(_indexed(pack(folder / f"{number:05d}.tar", members)))
        manifest = Manifest.of(indexed)
        manifest.save(folder / "manifest.json")
        return manifest

    return make


def _indexed(path):
    scanned, sidecar = scan(path), path.with_name(f"{path.name}.idx")
    head = write(sidecar, scanned, group(scanned.members), mtime_ns=path.stat().st_mtime_ns)
    return Shard(str(path), path.name, head.bytes, head.samples, head.digest, str(sidecar))


@pytest.fixture
def fault_server(tmp_path, monkeypatch):
    """A server of the folder `served`, which fails when it is told to."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    with FaultServer(folder) as server:
        yield server


@pytest.fixture
def no_pauses(monkeypatch):
    """Pauses between attempts take no time, and double until the deadline: in 25 s there are six of them.

    The last attempt begins after 12.6 s, so that a slow machine has the others to answer in.
    """

    class Clock(threading.local):
        now = 0.0

    class Pause(threading.Event):
        def wait(self, timeout=None):
            clock.now += timeout or 0.0
            return self.is_set()

    clock = Clock()
    for name, value in {
        "fetch.monotonic": lambda: clock.now,
        "fetch.random": SimpleNamespace(uniform=lambda _, high: high),
        "fetch._LONGEST_PAUSE": 1000.0,
        "fetch.Event": Pause,
        "ranges.Event": Pause,
    }.items():
        monkeypatch.setattr(f"datasets.remote.{name}", value)
