"""Batches of a mixture of sources, read ahead by threads.

Decoding and resizing release the GIL, so threads do it, and nothing is copied between processes. What a step
reads follows from the accounts before it: it is the same for any number of ranks, micro-batches and threads,
and the accounts are all there is to save.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import KW_ONLY, dataclass, field
from time import monotonic

import torch

from datasets.batch import Batch
from datasets.collate import collate
from datasets.errors import ShardError, UserError
from datasets.health import Meter
from datasets.holding import NEEDS, Holding
from datasets.mixture import Account, allot
from datasets.order import Order, Shuffle, share
from datasets.sample import Fault, Sample
from datasets.source import Source
from datasets.tokens import Tokenizer
from datasets.views import Augment
from datasets.weights import Weight, weight_at

_STEPS_AHEAD = 3
_CHUNK = 16  # samples read by one task: enough to hide its start, few enough to share a small batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """One source of a mixture, and what a run takes of it."""

    name: str
    source: Source
    holding: Holding = field(default_factory=Holding)
    weight: Weight = 1.0
    """Its share of the slots, in units of all weights together."""


@dataclass(frozen=True, slots=True)
class Masked:
    """A sample that could not be read, for the loop to count and record."""

    source: str
    position: int
    epoch: int
    key: str
    fault: Fault


@dataclass(frozen=True, slots=True)
class Portion:
    """One rank's share of one step."""

    step: int
    batches: tuple[Batch, ...]
    """Its micro-batches, source by source, as many on every rank. Those of one source, of all ranks and in
    order, are that source's part of the global batch."""
    masked: tuple[Masked, ...]
    accounts: Mapping[str, Account]
    """Where the sources stand after it."""


@dataclass(frozen=True)
class Loader:
    """Training batches for one rank."""

    feeds: Sequence[Feed]
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
    """Pieces that a rank's part of a source is cut into, or as many as leave each rank a sample in each."""
    augment: Augment | None = field(default_factory=Augment)
    """How random the views are; None for the fixed one."""
    threads: int = 1
    """Reading threads."""
    shuffle: Shuffle = field(default_factory=Shuffle)
    meter: Meter = field(default_factory=Meter)
    """Told how many steps lie ready whenever one is taken, under `queue`, and `steps`, how often that was."""
    late: Callable[[float], None] | None = None
    """Called by `steps` while a step does not come, with the seconds since it was wanted: after `patience`,
    and again whenever twice as many have passed."""
    patience: float = 30.0
    """Seconds."""

    def __post_init__(self) -> None:
        quantum = self.batch if len(self.feeds) == 1 else self.shuffle.lanes
        if self.batch % quantum:
            raise UserError(
                f"a batch of {self.batch} cannot be shared among {len(self.feeds)} sources in parts of "
                f"--shuffle.lanes {quantum}: make the batch a multiple of the lanes"
            )
        if len(self.feeds) > 1 and quantum < self.ranks:
            raise UserError(
                f"a source gets its slots in parts of --shuffle.lanes {quantum}, too few for {self.ranks} "
                "ranks: use as many lanes as ranks"
            )
        if len(self.feeds) == 1 and self.batch < self.ranks * self.micro_batches:
            raise UserError(
                f"a batch of {self.batch} cannot be shared among {self.ranks} ranks x {self.micro_batches} "
                f"micro-batches: it needs at least {self.ranks * self.micro_batches} samples"
            )

    def steps(
        self, first: int, last: int, *, accounts: Mapping[str, Account] | None = None
    ) -> Generator[Portion]:
        """Read steps [first, last), a few of them ahead of the consumer.

        An error in a reading thread is raised here, as it was. Closing the iterator ends its threads; where a
        shard cannot be read, those that wait for the same end when their source is closed.

        Args:
            first: the first step to read; weights follow from the number of the step.
            last: the step before which to stop.
            accounts: where the sources stand before step `first`, by name; at their beginning by default.
        """
        readers = _readers(self.threads)
        ahead: deque[Future[Portion]] = deque()
        standing = {feed.name: (accounts or {}).get(feed.name, Account()) for feed in self.feeds}
        gone = False
        try:
            for step in range(first, last):
                before, standing = standing, self._after(step, standing)
                ahead.append(self._submit(readers, step, before, standing))
                if len(ahead) > _STEPS_AHEAD:
                    yield self._next(ahead)
            while ahead:
                yield self._next(ahead)
        except ShardError:
            gone = True
            raise
        finally:
            readers.shutdown(wait=not gone, cancel_futures=True)

    def _after(self, step: int, accounts: Mapping[str, Account]) -> dict[str, Account]:
        weights = {feed.name: weight_at(feed.weight, step) for feed in self.feeds}
        return allot(accounts, weights, batch=self.batch, quantum=self.shuffle.lanes)

    def _next(self, ahead: deque[Future[Portion]]) -> Portion:
        self.meter.add("queue", sum(each.done() for each in ahead))
        self.meter.add("steps")
        reading = ahead.popleft()
        begin, patience = monotonic(), self.patience
        while not reading.done() and not wait([reading], timeout=patience).done:
            patience = monotonic() - begin
            if self.late is not None:
                self.late(patience)
        return reading.result()

    def _submit(
        self,
        readers: ThreadPoolExecutor,
        step: int,
        before: Mapping[str, Account],
        after: Mapping[str, Account],
    ) -> Future[Portion]:
        """Queue the reading of a step. Its last task waits for tasks queued before it, so never for ever."""
        reading: list[tuple[Feed, list[int], int, list[Future[list[Sample]]]]] = []
        for feed in self.feeds:
            start, stop = before[feed.name].position, after[feed.name].position
            if start == stop:
                continue
            order = self._order(feed)
            mine = share(stop - start, self.rank, self.ranks)
            positions = order.batch(start, stop)[mine.start : mine.stop]
            if feed.source.remote:
                readers.submit(_fetch_early, feed.source, order, positions)
            pieces = max(1, min(self.micro_batches, (stop - start) // self.ranks))
            chunks = [
                readers.submit(self._read, feed, positions[i : i + _CHUNK])
                for i in range(0, len(positions), _CHUNK)
            ]
            reading.append((feed, positions, pieces, chunks))
        return readers.submit(self._assemble, step, reading, after)

    def _order(self, feed: Feed) -> Order:
        lanes, window = self.shuffle.lanes, self.shuffle.window
        return Order(self.seed, feed.source.size, feed.name, lanes=lanes, window=window)

    def _read(self, feed: Feed, positions: Sequence[int]) -> list[Sample]:
        order, samples = self._order(feed), list[Sample]()
        for slot in map(order.__getitem__, positions):
            key = (self.seed, slot.epoch, slot.index)
            sample = feed.source.read(
                slot.index,
                seed=key,
                resolution=self.resolution,
                augment=self.augment,
                fields=NEEDS[feed.holding.holds],
            )
            samples.append(feed.holding(sample, key))
        return samples

    def _assemble(
        self,
        step: int,
        reading: Sequence[tuple[Feed, list[int], int, list[Future[list[Sample]]]]],
        after: Mapping[str, Account],
    ) -> Portion:
        batches: list[Batch] = []
        masked: list[Masked] = []
        for feed, positions, pieces, chunks in reading:
            samples = [sample for chunk in chunks for sample in chunk.result()]
            for part in (share(len(samples), piece, pieces) for piece in range(pieces)):
                some = samples[part.start : part.stop]
                images = "image" in NEEDS[feed.holding.holds]
                batches.append(
                    collate(some, self.tokenizer, resolution=self.resolution, images=images, source=feed.name)
                )
            size = feed.source.size
            masked += [
                Masked(feed.name, position, position // size if size else 0, sample.key, sample.fault)
                for position, sample in zip(positions, samples, strict=True)
                if sample.fault
            ]
        return Portion(step, tuple(batches), tuple(masked), after)


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
        return source.read(index, seed=(0, 0, index), resolution=resolution)

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


def _fetch_early(source: Source, order: Order, positions: Sequence[int]) -> None:
    """Ask for what is read next, and for what the next window of each lane will need."""
    for position in positions:
        source.prefetch(order[position].index)
        later = order.ahead(position)
        if later is not None:
            source.prefetch(later)


def _readers(threads: int) -> ThreadPoolExecutor:
    # A new thread takes the count that was set last, so the main thread must settle its own first; readers
    # get one each, for a team of OpenMP threads under every reader would choke the cores.
    torch.get_num_threads()
    return ThreadPoolExecutor(
        threads, thread_name_prefix="reader", initializer=torch.set_num_threads, initargs=(1,)
    )
