"""Bringing what a run knows to the disk."""

from __future__ import annotations

from pretrain import checkpoint
from pretrain.pieces import stage
from pretrain.reports import report
from pretrain.state import capture
from pretrain.training import Training


def save(training: Training) -> None:
    """Bring everything that is known to the disk: ledger first, then the checkpoint it belongs to."""
    report(training)
    ranks, folder, step = training.ranks, training.rundir.checkpoints, training.standing.step
    with training.clock.pause():
        for file in (training.ledger, training.quarantine):
            if file is not None:
                file.flush()
        beside = ranks.on_zero(lambda: checkpoint.begin(folder, step))
        if beside is None:
            return
        tensors = capture(training.pretrainer, training.optimizer)
        staged = {group: stage(named, zero=ranks.zero) for group, named in tensors.items()}
        state = training.standing.plain() if ranks.zero else None
        files = checkpoint.write_part(beside, staged, rank=ranks.rank, state=state)
        everyone = {name: entry for each in ranks.gather_objects(files) for name, entry in each.items()}
        ranks.on_zero(lambda: checkpoint.commit(beside, everyone))
        if ranks.zero:
            checkpoint.prune(folder, keep=training.run.cadence.keep)
        ranks.wait()
