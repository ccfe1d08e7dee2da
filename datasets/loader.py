"""Batches of a source, read ahead by threads.

Decoding and resizing release the GIL, so threads do it, and nothing is copied between processes. What a step
reads follows from its number alone: it is the same for any number of ranks, micro-batches and threads, and
there is no state to save.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

import torch

from datasets.batch import Batch
from datasets.collate import collate
from datasets.draws import draws
from datasets.errors import UserError
from datasets.order import Order, share
from datasets.sample import Sample
from datasets.source import Source
from datasets.tokens import Tokenizer

_STEPS_AHEAD = 3
_CHUNK = 16  # samples read by one task: enough to hide its start, few enough to share a small batch


@dataclass(frozen=True, slots=True)
class Masked:
    """A sample that could not be read, for the loop to count and record."""

    position: int
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Portion:
    """One rank's share of one step."""

    step: int
    batches: tuple[Batch, ...]
    """Its micro-batches. All ranks' micro-batches in order are the global batch."""
    masked: tuple[Masked, ...]


@dataclass(frozen=True)
class Loader:
    """Training batches of one source for one rank."""

    source: Source
    tokenizer: Tokenizer
    _: KW_ONLY
    seed: int
    """Of the run: it decides order, views and captions."""
    batch: int
    """Samples in the global batch."""
    resolution: int
    rank: int = 0
    ranks: int = 1
    micro_batches: int = 1
    train: bool = True
    """Draw random views rather than the fixed one."""
    threads: int = 1
    """Reading threads."""
    captions: Literal["one", "all"] = "one"
    """Draw one of a sample's captions, or give all of them."""

    def __post_init__(self) -> None:
        shares = self.ranks * self.micro_batches
        if self.batch < shares:
            raise UserError(
                f"a batch of {self.batch} cannot be shared among {self.ranks} ranks x {self.micro_batches} "
                f"micro-batches: it needs at least {shares} samples"
            )

    def steps(self, first: int, last: int, *, position: int = 0) -> Generator[Portion]:
        """Read steps [first, last), a few of them ahead of the consumer.

        An error in a reading thread is raised here, as it was. Closing the iterator ends its threads.

        Args:
            first: the first step to read, counted from where `position` stands.
            last: the step before which to stop.
            position: where step 0 starts; step s reads the `batch` positions from position + s * batch on.
        """
        readers = _readers(self.threads)
        ahead: deque[Future[Portion]] = deque()
        try:
            for step in range(first, last):
                ahead.append(self._submit(readers, step, position + step * self.batch))
                if len(ahead) > _STEPS_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            readers.shutdown(wait=True, cancel_futures=True)

    def _submit(self, readers: ThreadPoolExecutor, step: int, start: int) -> Future[Portion]:
        """Queue the reading of a step. Its last task waits for tasks queued before it, so never for ever."""
        mine = share(self.batch, self.rank, self.ranks)
        positions = range(start + mine.start, start + mine.stop)
        chunks = [
            readers.submit(self._read, positions[i : i + _CHUNK]) for i in range(0, len(positions), _CHUNK)
        ]
        return readers.submit(self._assemble, step, positions, chunks)

    def _read(self, positions: Sequence[int]) -> list[Sample]:
        order = Order(self.seed, self.source.size)
        samples: list[Sample] = []
        for slot in map(order.__getitem__, positions):
            key = (self.seed, slot.epoch, slot.index)
            sample = self.source.read(slot.index, seed=key, resolution=self.resolution, train=self.train)
            samples.append(_one_caption(sample, key) if self.captions == "one" else sample)
        return samples

    def _assemble(self, step: int, positions: Sequence[int], chunks: list[Future[list[Sample]]]) -> Portion:
        samples = [sample for chunk in chunks for sample in chunk.result()]
        parts = [share(len(samples), part, self.micro_batches) for part in range(self.micro_batches)]
        batches = (
            collate(samples[part.start : part.stop], self.tokenizer, resolution=self.resolution)
            for part in parts
        )
        masked = (
            Masked(position, sample.key, str(sample.fault))
            for position, sample in zip(positions, samples, strict=True)
            if sample.fault
        )
        return Portion(step, tuple(batches), tuple(masked))


@dataclass(frozen=True, slots=True)
class Examined:
    """A few samples of an evaluation set, in index order and in their fixed view, with all captions."""

    samples: tuple[Sample, ...]
    batch: Batch


def evaluation_batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch: int,
    resolution: int,
    limit: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    threads: int = 1,
) -> Generator[Examined]:
    """One rank's share of the first `limit` samples (by default all), a batch read ahead.

    The batches are the same on any number of ranks, which only share them out: embeddings keep their bits.
    """
    sizes = [size for size in (source.size, limit) if size is not None]
    assert sizes, "a source without end needs a limit"
    starts = range(0, min(sizes), batch)
    mine = share(len(starts), rank, ranks)

    def read(index: int) -> Sample:
        return source.read(index, seed=(0, 0, index), resolution=resolution, train=False)

    with _readers(threads) as readers:
        ahead: deque[list[Future[Sample]]] = deque()
        try:
            for start in starts[mine.start : mine.stop]:
                ahead.append([readers.submit(read, i) for i in range(start, min(start + batch, *sizes))])
                if len(ahead) > 1:
                    yield _examined(ahead.popleft(), tokenizer, resolution)
            while ahead:
                yield _examined(ahead.popleft(), tokenizer, resolution)
        finally:
            readers.shutdown(cancel_futures=True)


def _examined(reading: list[Future[Sample]], tokenizer: Tokenizer, resolution: int) -> Examined:
    samples = tuple(one.result() for one in reading)
    return Examined(samples, collate(samples, tokenizer, resolution=resolution))


def _readers(threads: int) -> ThreadPoolExecutor:
    # A new thread takes the count that was set last, so the main thread must settle its own first; readers
    # get one each, for a team of OpenMP threads under every reader would choke the cores.
    torch.get_num_threads()
    return ThreadPoolExecutor(
        threads, thread_name_prefix="reader", initializer=torch.set_num_threads, initargs=(1,)
    )


def _one_caption(sample: Sample, key: tuple[int, ...]) -> Sample:
    """The sample with one of its captions, drawn by `key`, and the phrases of that caption."""
    if len(sample.captions) < 2:
        return sample
    chosen = int(draws("caption", *key)[0] * len(sample.captions))
    return replace(
        sample,
        captions=(sample.captions[chosen],),
        phrases=tuple(replace(phrase, caption=0) for phrase in sample.phrases if phrase.caption == chosen),
    )
