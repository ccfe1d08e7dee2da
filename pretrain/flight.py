"""A checkpoint that is written while training goes on: at most one is in flight.

At a step boundary every rank copies what it holds to host memory; a thread of each writes, hashes and syncs
it. No collective runs in a thread: at the beginning of each later step, the sum that all ranks make there
anyway tells them how many have written and how many have failed. When all have written, rank zero makes it a
checkpoint; when one has failed, all let go of it, rank zero says so, and what stood there before stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import torch

from datasets.errors import UserError
from pretrain import checkpoint
from pretrain.distributed import Ranks
from pretrain.pieces import AbandonedError, Entry, stage
from pretrain.state import Tensors


@dataclass(frozen=True, slots=True)
class _Flight:
    step: int
    beside: Path
    files: Future[dict[str, Entry]]
    """What this rank writes."""
    unwanted: Event = field(default_factory=Event)


class Saver:
    """Writes the checkpoints of a run. What is not about this rank alone is called by all of them at once."""

    def __init__(
        self,
        ranks: Ranks,
        folder: Path,
        *,
        keep: int,
        keep_every: int,
        note: Callable[[str], None],
        ends: Collection[int] = (),
    ) -> None:
        """Nothing is touched yet.

        Args:
            ranks: who writes.
            folder: RUN_DIR/checkpoints.
            keep: see `checkpoint.prune`.
            keep_every: see there.
            note: told of checkpoints that could not be written, while training goes on.
            ends: see `checkpoint.prune`.
        """
        self._ranks, self._folder, self._note = ranks, folder, note
        self._keep, self._keep_every, self._ends = keep, keep_every, ends
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._flight: _Flight | None = None
        self._pruning: Future[None] | None = None
        self._newest: int | None = None
        self._failure: str | None = None
        self._last = False

    def begin(
        self,
        step: int,
        tensors: Callable[[], Tensors],
        state: Mapping[str, checkpoint.JSON],
        *,
        last: bool = False,
    ) -> None:
        """Copy what this rank holds and begin to write it, once the one before is written.

        Args:
            step: optimizer steps done.
            tensors: gives group to names to tensors, as this rank holds them; they may change afterwards.
            state: everything else that the run must remember.
            last: nothing comes after it; `finish` says whether it failed, and nobody else is told.
        """
        self.finish()
        self._last = last
        if self._newest == step:
            return
        ranks, folder = self._ranks, self._folder
        try:
            beside = ranks.on_zero(lambda: checkpoint.begin(folder, step))
        except UserError as error:
            self._fail(str(error))
            return
        if beside is None:
            self._newest, self._failure = step, None
            return
        staged = {group: stage(named, zero=ranks.zero) for group, named in tensors().items()}
        unwanted = Event()
        files = self._thread.submit(
            checkpoint.write_part,
            beside,
            staged,
            rank=ranks.rank,
            state=state if ranks.zero else None,
            unwanted=unwanted,
        )
        self._flight = _Flight(step, beside, files, unwanted)

    def asks(self) -> dict[str, float]:
        """This rank's part of what all must know: whether it has written, or failed to."""
        done = self._flight is not None and self._flight.files.done()
        failed = done and self._reason() is not None
        return {"written": float(done and not failed), "failed": float(failed)}

    def settle(self, sums: Mapping[str, float]) -> None:
        """Act on the sums of what all have asked: publish what is written, let go of what failed."""
        if self._pruning is not None and self._pruning.done():
            self._pruned(self._pruning)
        if self._flight is not None and sums["failed"]:
            self._let_go(self._flight)
        elif self._flight is not None and sums["written"] == self._ranks.world:
            self._publish(self._flight)

    def finish(self) -> str | None:
        """Wait for what is in flight; in words, why the last one that was begun is no checkpoint, if so."""
        if self._flight is not None:
            self._flight.files.exception()  # waits
            asked = self.asks()
            sums = self._ranks.sum(torch.tensor(list(asked.values()), device=self._ranks.device))
            self.settle(dict(zip(asked, sums.tolist(), strict=True)))
        if self._pruning is not None:
            self._pruned(self._pruning)
        return self._failure

    def close(self) -> None:
        """Let go of what is in flight, without the other ranks; the next start removes what it leaves."""
        if self._flight is not None:
            self._flight.unwanted.set()
        self._thread.shutdown()

    def _reason(self) -> str | None:
        """Why this rank could not write, in words. Waits.

        Raises:
            Exception: whatever is no fault of the disk.
        """
        assert self._flight is not None
        error = self._flight.files.exception()
        if error is None or isinstance(error, AbandonedError):
            return None
        if isinstance(error, OSError):
            return error.strerror or str(error)
        raise error

    def _publish(self, flight: _Flight) -> None:
        parts = self._ranks.gather_objects(flight.files.result())
        files = {name: entry for part in parts for name, entry in part.items()}
        try:
            self._ranks.on_zero(lambda: checkpoint.commit(flight.beside, files))
        except UserError as error:
            self._give_up(flight, str(error))
            return
        self._flight, self._newest, self._failure = None, flight.step, None
        if self._ranks.zero:
            self._pruning = self._thread.submit(
                checkpoint.prune,
                self._folder,
                keep=self._keep,
                keep_every=self._keep_every,
                ends=self._ends,
            )

    def _let_go(self, flight: _Flight) -> None:
        flight.unwanted.set()
        # Nobody writes there any more when all have said why.
        reasons = self._ranks.gather_objects(self._reason())
        said = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
        rank, reason = said[0]
        where = f"rank {rank}: {reason}" if self._ranks.world > 1 else reason
        self._give_up(flight, checkpoint.unsaved(self._folder, flight.step, where))

    def _give_up(self, flight: _Flight, sentence: str) -> None:
        self._flight = None
        if self._ranks.zero:
            checkpoint.drop(flight.beside)
        self._fail(sentence)

    def _fail(self, sentence: str) -> None:
        self._failure = sentence
        if not self._last:
            self._note(f"warning: {sentence}, and training goes on")

    def _pruned(self, pruning: Future[None]) -> None:
        self._pruning = None
        error = pruning.exception()
        if isinstance(error, OSError):
            self._note(f"warning: old checkpoints in {self._folder} cannot be removed ({error.strerror})")
        elif error is not None:
            raise error
