"""Judge a run or an export: `python -m pretrain.evaluate runs/mine --data 'val/*.tar'`, or under torchrun.

Reads the newest checkpoint without touching the run, measures everything that the data and the model allow,
prints a table, and writes it as JSON. Exit codes: 0 done, 2 the user can mend it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import tyro

from datasets.classes import load_classes
from datasets.commands import run
from datasets.errors import UserError
from datasets.source import Source
from datasets.sources import open_source
from pretrain.distributed import Ranks, SaidByRankZeroError, join_ranks
from pretrain.evaluate.examine import examine
from pretrain.evaluate.judge import Judge
from pretrain.evaluate.possible import Examination, Measure, plan
from pretrain.evaluate.results import AVERAGED, Results, save, table
from pretrain.evaluate.scenes import examine_scenes
from pretrain.evaluate.subject import Subject, Weights, load_subject
from pretrain.precision import Precision, compute_for
from pretrain.rundir import RunDir
from pretrain.threads import settle_threads


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
    weights: Weights = "ema"
    """`ema` for the moving average of the weights where the checkpoint has one, `raw` for those that were
    trained."""
    limit: int = 0
    """Samples of the data to look at; 0 for all, or for as many as in training where --data is left out."""
    resolution: int = 0
    """Side of the images in pixels; 0 for what the model was last trained with."""
    batch: int = 256
    """Images that a process encodes at a time."""
    rerank: int = 16
    """The nearest answers of a query of retrieval that a model trained to match pairs puts into a new
    order; 0 for none."""
    json: Path | None = None
    """Where the results go; by default RUN_DIR/evaluations, where there is a run."""


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    command = tyro.cli(Command, args=arguments, prog="python -m pretrain.evaluate")
    try:
        with join_ranks(command.subject) as ranks:
            _evaluate(command, ranks)
    except SaidByRankZeroError:
        return 2
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _evaluate(command: Command, ranks: Ranks) -> None:
    for flag, least in (("limit", 0), ("resolution", 0), ("batch", 1), ("rerank", 0)):
        if getattr(command, flag) < least:
            raise UserError(f"--{flag} is {getattr(command, flag)}; it must be at least {least}")
    subject = load_subject(command.subject, step=command.step, weights=command.weights, ranks=ranks)
    if command.rerank not in (0, Command.rerank) and subject.matcher is None:
        raise UserError(
            f"--rerank {command.rerank} needs a model that was trained to tell matching pairs from others, "
            "as by --objectives itc,itm: leave it out"
        )
    command = _as_in_training(command, subject)
    resolution = command.resolution or subject.resolution
    if subject.run is not None and ranks.device.type == "cpu":
        # What was measured in training: idle threads that spin can cost more than they give.
        settle_threads(subject.run.precision.threads, kept=RunDir(command.subject).threads, step=None)
    compute = compute_for(subject.run.precision if subject.run else Precision(), ranks.device)
    judge = Judge(
        model=subject.model,
        tokenizer=subject.tokenizer,
        compute=compute,
        batch=command.batch,
        compares=subject.compares,
        matcher=subject.matcher,
        rerank=command.rerank,
    )
    said: list[str] = []
    results = _measure(command, judge, resolution=resolution, ranks=ranks, note=said.append)
    if not ranks.zero:
        return
    if (where := command.json or (_kept(command) if subject.run else None)) is not None:
        kept = {name: getattr(command, name) for name in ("data", "limit", "classes")}
        save(where, results, step=subject.step, resolution=resolution, averaged=subject.averaged, **kept)
        said.append(f"written to {where}")
    at = f" at step {subject.step}" if subject.step else ""
    averaged = [AVERAGED] if subject.averaged else []
    for line in [f"{subject.name}{at} on {command.data}", *averaged, *table(results), *said]:
        sys.stdout.write(f"{line}\n")


def _as_in_training(command: Command, subject: Subject) -> Command:
    """The command, with the data and classes that it leaves open filled in from the run."""
    run = subject.run
    own = "" if run is None else run.val or ("scenes" if run.data == "scenes" else "")
    if not (command.data or own):
        raise UserError(f"{command.subject} was not evaluated in training: name data by --data")
    if run is not None and command.data in ("", own):
        command = replace(command, classes=command.classes or run.eval.classes)
    if run is not None and not command.data and own != "scenes":
        command = replace(command, limit=command.limit or run.eval.limit)
    return replace(command, data=command.data or own)


def _measure(
    command: Command, judge: Judge, *, resolution: int, ranks: Ranks, note: Callable[[str], None]
) -> Results:
    if command.data == "scenes":
        if command.measures or command.classes or command.train or command.limit:
            raise UserError("scenes have their own measures: only --step and --resolution go with them")
        return examine_scenes(judge, resolution=resolution, ranks=ranks)
    examination = Examination(
        source=_open(command.data),
        resolution=resolution,
        measures=command.measures,
        classes=load_classes(command.classes) if command.classes else None,
        train=_open(command.train) if command.train else None,
        limit=command.limit or None,
    )
    for sentence in plan(judge, examination).left_out:
        note(sentence)
    return examine(judge, examination, ranks=ranks, note=note)


def _open(spec: str) -> Source:
    return open_source(spec, seed=0, split="test")


def _kept(command: Command) -> Path:
    """RUN_DIR/evaluations/NAME.json, by what was asked; the same question again takes its place."""
    asked = (
        command.data, command.measures, command.classes, command.train, command.limit, command.resolution,
        command.rerank, *(["raw"] if command.weights == "raw" else []),
    )  # fmt: skip
    name = re.sub(r"\W+", "-", command.data.replace(".tar", "")).strip("-")[-60:]
    digest = blake2b(repr(asked).encode(), digest_size=4).hexdigest()
    return RunDir(command.subject).evaluations / f"{name}-{digest}.json"


if __name__ == "__main__":
    run(main)
