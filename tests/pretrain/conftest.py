"""What tests of several parts share."""

import json
import os
import random
import signal
import tarfile
import traceback
from pathlib import Path

import numpy as np
import pytest
from webdataset.writer import TarWriter

from datasets.corpus import encoded

SAMPLES = 40  # of each shard
_WORDS = [
    "red",
    "blue",
    "green",
    "small",
    "large",
    "dog",
    "ball",
    "tree",
    "near",
    "under",
    "beside",
    "runs",
    "stands",
    "water",
    "stone",
]


@pytest.fixture
def logged_out(tmp_path, monkeypatch):
    """No key, no settings and no login of W&B are to be found."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    (tmp_path / "home").mkdir()


@pytest.fixture(scope="session")
def write_shard():
    """Writes a shard of a kind (captions, phrases, classes); the bytes follow from its name and the seed."""

    def write(path: Path, kind: str, *, samples: int = SAMPLES, seed: int = 0) -> Path:
        drawn = random.Random(f"{path.name} {seed}")
        with TarWriter(str(path), encoder=False, mtime=0) as tar:
            for number in range(samples):
                tar.write({"__key__": f"{number:05d}", **_sample(kind, number, drawn)})
        return path

    return write


def _sample(kind: str, number: int, drawn: random.Random) -> dict[str, bytes]:
    picture = np.random.default_rng(drawn.randrange(2**32)).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    sample = {"jpg": encoded(picture, "JPEG", quality=60)}
    texts = [" ".join(drawn.sample(_WORDS, 5)) for _ in range(3)]
    if kind == "classes":
        return {**sample, "json": json.dumps({"class": _WORDS[number % 10]}).encode()}
    if kind == "phrases":
        corner = drawn.uniform(0, 0.4)
        box = {"phrase": texts[0][:9], "box_xyxy": [corner, corner, 0.9, 0.9], "caption_index": 0}
        return {**sample, "json": json.dumps({"caption": texts[0], "boxes": [box]}).encode()}
    return {**sample, "txt": texts[0].encode(), "json": json.dumps({"captions": texts}).encode()}


@pytest.fixture(scope="session")
def write_corpus(write_shard):
    """Writes six shards of captions, three of phrases, three of classes; gives the flags of a run on them."""

    def write(folder: Path) -> str:
        for kind, shards in {"captions": 6, "phrases": 3, "classes": 3}.items():
            (folder / kind).mkdir(parents=True)
            for number in range(shards):
                write_shard(folder / kind / f"{number:05d}.tar", kind)
        weights = {"captions": "2", "phrases": "0 1 24 3", "classes": "6 2 30 0"}
        return " ".join(
            f"--data {kind}={folder}/{kind}/*.tar --sources.{kind}.holds {kind} "
            f"--sources.{kind}.weight {weight}"
            for kind, weight in weights.items()
        )

    return write


@pytest.fixture(scope="session")
def members():
    """The names in a shard and where the bytes of each lie: (offset, size)."""

    def find(path: Path) -> dict[str, tuple[int, int]]:
        with tarfile.open(path) as tar:
            return {info.name: (info.offset_data, info.size) for info in tar}

    return find


@pytest.fixture(scope="session")
def in_child():
    """Runs something in a fork of this process, in which it may be killed."""

    def run(work) -> int:
        """Run in a forked process, which may be killed; 0 if it came to its end, -9 if killed."""
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(300)
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return run
