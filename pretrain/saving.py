"""Bringing what a run knows to the disk."""

from __future__ import annotations

from pretrain import checkpoint
from pretrain.reports import report
from pretrain.state import capture
from pretrain.training import Training


def save(training: Training) -> None:
    """Bring everything that is known to the disk: ledger first, then the checkpoint it belongs to."""
    report(training, training.curriculum.stretch_of(max(0, training.standing.step - 1)))
    if training.ranks.zero:
        with training.clock.pause():
            for file in (training.ledger, training.quarantine):
                if file is not None:
                    file.flush()
            folder, step = training.rundir.checkpoints, training.standing.step
            tensors = capture(training.pretrainer, training.optimizer)
            checkpoint.save(folder, step, tensors, training.standing.plain())
            checkpoint.prune(folder, keep=training.run.cadence.keep)
    training.ranks.wait()
