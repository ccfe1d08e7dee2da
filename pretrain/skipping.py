"""What follows when a step is skipped: who did it is named and written down, and too many end the run.

RUN_DIR/faults.jsonl holds one JSON object for each step that was skipped, with what was not finite and whose:

    {"step": 120, "kind": "loss", "objectives": ["itc"], "towers": ["image"], "samples": 1,
     "named": [{"rank": 1, "source": "data", "key": "00003.tar/00017", "reason": "image encoding"}]}

A skipped step changes no weight, so that every state in memory is the last good one, and the data that were
skipped are never met again. While steps are skipped one after the other the newest checkpoint stays the one
before them, and weights that are not finite are never saved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from datasets.batch import Batch
from datasets.errors import UserError
from pretrain import checkpoint
from pretrain.curriculum import Stretch
from pretrain.faults import Fault
from pretrain.fencing import Records
from pretrain.pretrainer import Pretrainer
from pretrain.reports import report
from pretrain.state import capture
from pretrain.suspects import Suspect, find_suspects
from pretrain.training import Training

_ALOUD = 3  # samples that are named in a sentence
_WRITTEN = 256  # and in a line of faults.jsonl: a global batch may have tens of thousands


def answer(training: Training, stretch: Stretch, batches: Sequence[Batch], fault: Fault) -> None:
    """Name and write down what made the step unfit that was just skipped, on all ranks together.

    Args:
        training: its standing counts the step already.
        stretch: the stage.
        batches: this rank's micro-batches of the step.
        fault: what was wrong with it.

    Raises:
        UserError: the weights themselves are not finite, which no further step would mend; or as many steps
            in a row were skipped as the run allows.
    """
    check_sound(training, stretch)
    run, standing = training.run, training.standing
    suspects = find_suspects(training.setup, batches, fault, key=(run.seed, standing.step - 1))
    if training.ranks.zero:
        _write(training, fault, suspects)
        training.sink.note(
            f"warning: step {standing.step} was skipped on all ranks: {fault} ({_named(suspects)}); "
            f"{training.rundir.faults} has the details"
        )
    if standing.streak >= run.bad.steps:
        _stop(
            training,
            stretch,
            f"{standing.streak} steps in a row, the last of them step {standing.step}, were skipped: {fault} "
            f"({_named(suspects)}); {training.rundir.faults} has the details and {{checkpoint}}: mend the "
            f"data named there, try a lower --stages.{stretch.name}.optim.lr with --allow-changed, or allow "
            "more with --bad.steps",
        )


def check_sound(training: Training, stretch: Stretch) -> None:
    """Refuse to go on with, or to save, weights or moments that are not finite. All ranks call it together.

    Raises:
        UserError: some are not; names a few, and the checkpoint to go on from.
    """
    found = unsound(training.pretrainer, training.optimizer)
    everyone = training.ranks.gather_objects(found)
    names = [f"{name} on rank {rank}" for rank, names in enumerate(everyone) for name in names]
    if names:
        _stop(
            training,
            stretch,
            f"after step {training.standing.step} the weights themselves are not finite "
            f"({_few(names)}): {{checkpoint}}; the same command goes on from there, and if it comes to this "
            f"again, try a lower --stages.{stretch.name}.optim.lr with --allow-changed",
        )


@torch.no_grad()
def unsound(pretrainer: Pretrainer, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters and moments, of those that this rank holds, that are not finite.

    Buffers may be what they like: a mask is made of infinities.
    """
    held = capture(pretrainer, optimizer)
    parameters = {name: held["model"][name] for name, _ in pretrainer.named_parameters()}
    named = {**parameters, **held["optimizer"]}
    flags = [_here(value).isfinite().all() for value in named.values()]
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return [name for name, sound in zip(named, finite, strict=True) if not sound]


def _here(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _write(training: Training, fault: Fault, suspects: Sequence[Suspect]) -> None:
    line = {
        "step": training.standing.step,
        "kind": fault.kind,
        "objectives": fault.objectives,
        "towers": fault.towers,
        "samples": len(suspects),
        "named": [one._asdict() for one in suspects[:_WRITTEN]],
    }
    with Records(training.rundir.faults) as file:
        file.write(json.dumps(line).encode() + b"\n")
        os.fsync(file.fileno())


def _named(suspects: Sequence[Suspect]) -> str:
    """Those that did it; where none did it alone, how many there are."""
    if not suspects or not suspects[0].reason:
        return f"no sample alone, of {len(suspects):,}"
    return _few([f"sample {one}" for one in suspects])


def _few(names: Sequence[str]) -> str:
    more = len(names) - _ALOUD
    return ", ".join(names[:_ALOUD]) + (f" and {more:,} more" if more > 0 else "")


def _stop(training: Training, stretch: Stretch, reason: str) -> NoReturn:
    """End the run on every rank with a sentence.

    What was done is in the ledger, and a checkpoint of good weights that is being written is let land.
    """
    report(training)
    training.saver.finish()

    def say() -> NoReturn:
        raise UserError(reason.replace("{checkpoint}", _last(training)))

    training.ranks.on_zero(say)
    raise AssertionError("on_zero raises what it was told on every rank")


def _last(training: Training) -> str:
    """The checkpoint to go back to, in words."""
    try:
        found = checkpoint.chosen(training.rundir.checkpoints)
    except UserError:
        return "no checkpoint was written before"
    return f"the checkpoint of step {found.step} is the last good one"
