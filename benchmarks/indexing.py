"""What indexing costs: CPU seconds per gigabyte, with checksums, beside `tarfile` and webdataset.

    python -m benchmarks.indexing [--gigabytes 0.3]

Shards of 10,000 samples at most are written to a temporary folder as img2dataset does, through webdataset's
writer: an image of random bytes, a caption and a record of 600 bytes. Indexing reads every byte, takes the
CRC-32 of every member, checks every header and writes the sidecar. "CRC-32 alone" reads the file and sums it
up as one: the least it could cost. `tarfile` only walks over the headers (what an index without checksums
needs), webdataset iterates over undecoded samples. Each is measured three times in turn, in one process, from
files that were just written (so that the disk is not measured), and the least counts. Exit code 1 if a bar is
missed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from datasets.shards.indexing import Job, index_one

SIZES = (30_000, 50_000, 100_000)
"""Bytes of an image: 256 pixels a side to 512."""
BAR = 0.6
"""CPU seconds per GB, for each size."""
_PER_SHARD = 10_000
_ROUNDS = 3


def write(path: Path, *, size: int, samples: int) -> None:
    """One shard."""
    source = random.Random(0)
    with TarWriter(str(path)) as writer:
        for number in range(samples):
            record = {"key": f"{number:09d}", "status": "success", "url": "https://example.org/" + "x" * 500}
            sample = {"jpg": source.randbytes(size), "txt": "a caption of some ordinary length, in words"}
            writer.write({"__key__": record["key"], **sample, "json": json.dumps(record)})


def ours(path: Path) -> int:
    """Index a shard that has no sidecar; returns how many samples it found."""
    sidecar = path.with_suffix(".idx")
    sidecar.unlink(missing_ok=True)
    head = index_one(Job(str(path), str(sidecar))).head
    return 0 if head is None else head.samples


def by_tarfile(path: Path) -> int:
    """Walk over the headers."""
    with tarfile.open(path, "r:") as tar:
        return sum(info.name.endswith(".jpg") for info in tar)


def by_webdataset(path: Path) -> int:
    """Iterate over samples as bytes."""
    return sum("jpg" in sample for sample in WebDataset(str(path), shardshuffle=False))


def by_nothing(path: Path) -> int:
    """Read the file and take one CRC-32: what no index with checksums can do without."""
    buffer, value = bytearray(4 << 20), 0
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            value = zlib.crc32(memoryview(buffer)[:got], value)
    return -1


READERS: dict[str, Callable[[Path], int]] = {
    "indexing": ours,
    "CRC-32 alone": by_nothing,
    "tarfile, headers": by_tarfile,
    "webdataset": by_webdataset,
}


def measure(size: int, gigabytes: float, folder: Path) -> dict[str, float]:
    """CPU seconds per GB of each reader."""
    count = max(int(gigabytes * 1e9 / (size + 6 * 512)), 1)
    shards = [folder / f"{size}-{first}.tar" for first in range(0, count, _PER_SHARD)]
    for number, path in enumerate(shards):
        write(path, size=size, samples=min(_PER_SHARD, count - number * _PER_SHARD))
    total = sum(path.stat().st_size for path in shards) / 1e9
    least: dict[str, float] = {}
    for _ in range(_ROUNDS):
        for name, reader in READERS.items():
            started = time.process_time()
            found = sum(map(reader, shards))
            seconds = (time.process_time() - started) / total
            assert found in (count, -len(shards)), f"{name} found {found} of {count} samples"
            least[name] = min(least.get(name, seconds), seconds)
    for path in shards:
        path.unlink()
    return least


def main(arguments: Sequence[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.3, help="written for each size of image")
    options = parser.parse_args(arguments)
    print("CPU s/GB" + "".join(f"{name:>18}" for name in READERS))
    missed = False
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            least = measure(size, options.gigabytes, Path(folder))
        print(f"{size // 1000:>5} kB" + "".join(f"{least[name]:>18.2f}" for name in READERS), flush=True)
        missed |= least["indexing"] > BAR
    print(f"bar: indexing takes at most {BAR} CPU s/GB: {'missed' if missed else 'met'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
