"""Bringing what a run knows to the disk."""

from __future__ import annotations

from datasets.errors import UserError
from pretrain.distributed import SaidByRankZeroError
from pretrain.reports import report
from pretrain.state import capture
from pretrain.training import Training


def save(training: Training, *, last: bool = False) -> None:
    """Bring everything that is known to the disk: ledger first, then the checkpoint it belongs to.

    That is written while training goes on; if it cannot be, that is said, and those before it stay.

    Args:
        training: where it stands is saved.
        last: nothing comes after it, so that it is waited for.

    Raises:
        UserError: the last one cannot be written.
    """
    report(training)
    with training.clock.pause():
        for file in (training.ledger, training.quarantine):
            if file is not None:
                file.flush()
        training.saver.begin(
            training.standing.step,
            lambda: capture(training.pretrainer, training.optimizer, training.ema),
            training.standing.plain(),
            last=last,
        )
        failure = training.saver.finish() if last else None
    if failure is not None:
        raise UserError(failure) if training.ranks.zero else SaidByRankZeroError(failure)
