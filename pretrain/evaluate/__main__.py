"""Judge a run or an export: `python -m pretrain.evaluate runs/mine --data 'val/*.tar'`, or under torchrun.

Reads the newest checkpoint without touching the run, measures everything that the data and the model allow,
prints a table, and writes it as JSON. Exit codes: 0 done, 2 the user can mend it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from datasets.errors import UserError
from datasets.source import Source
from datasets.sources import open_source
from datasets.views import Augment
from pretrain.distributed import Ranks, SaidByRankZeroError, join_ranks
from pretrain.evaluate.examine import Examination, Measure, examine
from pretrain.evaluate.judge import Judge
from pretrain.evaluate.results import Results, save, table
from pretrain.evaluate.scenes import examine_scenes
from pretrain.evaluate.subject import Subject, load_subject
from pretrain.evaluate.zero_shot import load_classes
from pretrain.precision import Precision, compute_for
from pretrain.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class Command:
    """Judge a trained model on any data."""

    subject: Annotated[Path, tyro.conf.Positional]
    """A run directory, or what `pretrain.export` wrote."""
    data: str = ""
    """`scenes`, or tar shards as for training; by default what the run was evaluated on."""
    measures: tuple[Measure, ...] = ()
    """What to measure; by default all that the data and the model allow."""
    classes: str = ""
    """`imagenet`, or a text file with one class name a line; by default the names that the labels are."""
    train: str = ""
    """Labelled shards that the probes learn from."""
    step: int | None = None
    """The checkpoint to judge; by default the newest."""
    limit: int = 0
    """Samples of the data to look at; 0 for all."""
    resolution: int = 0
    """Side of the images in pixels; 0 for what the model was last trained with."""
    json: Path | None = None
    """Where the results go; by default RUN_DIR/evaluations, where there is a run."""


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    command = tyro.cli(Command, args=arguments, prog="python -m pretrain.evaluate")
    try:
        with join_ranks() as ranks:
            _evaluate(command, ranks)
    except SaidByRankZeroError:
        return 2
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _evaluate(command: Command, ranks: Ranks) -> None:
    if command.limit < 0 or command.resolution < 0:
        raise UserError("--limit and --resolution are at least 0")
    subject = load_subject(command.subject, step=command.step, ranks=ranks)
    spec = command.data or (subject.run and (subject.run.val or subject.run.data)) or ""
    if not spec:
        raise UserError(f"{command.subject} does not say on what to judge it: name data by --data")
    precision = subject.run.precision if subject.run else Precision()
    compute = compute_for(precision, ranks.device)
    judge = Judge(model=subject.model, tokenizer=subject.tokenizer, compute=compute)
    notes, results = _measure(command, spec, subject, judge, ranks)
    if not ranks.zero:
        return
    at = f" at step {subject.step}" if subject.step else ""
    where = command.json or (_kept(command.subject, spec) if subject.run else None)
    for line in [*notes, f"{subject.name}{at} on {spec}", *table(results)]:
        sys.stdout.write(f"{line}\n")
    if where is not None:
        save(where, results, step=subject.step, data=spec)
        sys.stdout.write(f"written to {where}\n")


def _measure(
    command: Command, spec: str, subject: Subject, judge: Judge, ranks: Ranks
) -> tuple[list[str], Results]:
    resolution = command.resolution or subject.resolution
    if spec == "scenes":
        if command.measures or command.classes or command.train or command.limit:
            raise UserError("scenes have their own measures: only --step and --resolution go with them")
        return [], examine_scenes(judge, resolution=resolution, ranks=ranks)
    examination = Examination(
        source=_open(spec),
        resolution=resolution,
        measures=command.measures,
        classes=load_classes(command.classes) if command.classes else None,
        train=_open(command.train) if command.train else None,
        limit=command.limit or None,
    )
    results = examine(judge, examination, ranks=ranks)
    return examination.notes, results


def _open(spec: str) -> Source:
    return open_source(spec, seed=0, split="test", augment=Augment())


def _kept(run: Path, spec: str) -> Path:
    """RUN_DIR/evaluations/NAME.json, by a name made of the data's; a second evaluation takes its place."""
    name = re.sub(r"[^\w.-]+", "-", spec).strip("-.")[-80:]
    return RunDir(run).evaluations / f"{name}.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
