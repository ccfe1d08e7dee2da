"""Whether reading holds on to anything: memory, open files and threads after each of three epochs.

    python -m benchmarks.memory [--data 'shards/*.tar'] [--epochs 3]

Without --data, 15,360 JPEG images of 96 pixels are written to a temporary folder, 40 a shard. The loader
reads them as a run does: shuffled in several windows, decoded, cropped, put into batches, of which nobody
keeps any. After each epoch the C library is asked to give back what it has free; what the process holds in
memory (RSS), its descriptors and its threads are counted. The first epoch fills what is bounded: open files,
sidecars, pools of the C library. Exit code 1 if a later one added to it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from datasets.corpus import encoded
from datasets.loader import Feed, Loader
from datasets.order import Shuffle
from datasets.sources import open_source
from datasets.tokens import TrainedBPE

SHARDS, SAMPLES, SIDE = 384, 40, 96
BATCH, RESOLUTION, WINDOW = 64, 64, 4096
MEGABYTES = 5.0
"""Bar: what the last epoch may hold more than the first. As many descriptors and threads, none more."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds."""

    megabytes: float
    files: int
    threads: int


def held() -> Held:
    """What this process holds now, after what can be given back was."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(
        pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        sum(1 for _ in Path("/proc/self/fd").iterdir()),
        sum(1 for _ in Path("/proc/self/task").iterdir()),
    )


def write(folder: Path, *, shards: int, samples: int, side: int) -> None:
    """Shards of JPEG images with captions."""
    random = np.random.default_rng(0)
    for shard in range(shards):
        with TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False) as tar:
            for number in range(samples):
                coarse = random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
                image = encoded(np.kron(coarse, np.ones((8, 8, 1), np.uint8)), "JPEG")
                caption = " ".join(f"word{word}" for word in random.integers(0, 500, 12)).encode()
                tar.write({"__key__": f"{number:05d}", "jpg": image, "txt": caption})


def epochs(spec: str, *, count: int, threads: int, batch: int, window: int) -> Iterator[Held]:
    """Read so many epochs, and give what is held after each.

    Args:
        spec: shards.
        count: epochs.
        threads: that read.
        batch: samples in a batch; an epoch ends with the batch that its last sample is in.
        window: samples that are shuffled with each other.
    """
    source = open_source(spec, seed=0, split="train", say=print)
    assert source.size is not None
    captions = (caption for index in range(1000) for caption in source.captions(index % source.size))
    tokenizer = TrainedBPE.train(captions, vocabulary=1000, context_length=64)
    loader = Loader(
        [Feed(name="data", source=source)],
        tokenizer,
        seed=0,
        batch=batch,
        resolution=RESOLUTION,
        threads=threads,
        shuffle=Shuffle(window=window),
    )
    ends = [-(-source.size * epoch // batch) for epoch in range(1, count + 1)]
    # A step more, so that the threads still read ahead when the last epoch is counted.
    for portion in loader.steps(0, ends[-1] + 1):
        if portion.step + 1 in ends:
            yield held()


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--data", default="", help="tar shards; by default some are written")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        spec = options.data or f"{folder}/*.tar"
        if not options.data:
            write(Path(folder), shards=SHARDS, samples=SAMPLES, side=SIDE)
        found: list[Held] = []
        began = time.perf_counter()
        reading = epochs(spec, count=options.epochs, threads=options.threads, batch=BATCH, window=WINDOW)
        for epoch, now in enumerate(reading, start=1):
            found.append(now)
            print(
                f"epoch {epoch}: {now.megabytes:.1f} MB, {now.files} descriptors, {now.threads} threads, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
    first, last = found[0], found[-1]
    grown = last.megabytes - first.megabytes
    steady = grown < MEGABYTES and last.files <= first.files and last.threads <= first.threads
    print(f"grown by {grown:+.1f} MB (bar {MEGABYTES:g}): {'met' if steady else 'MISSED'}")
    return 0 if steady else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
