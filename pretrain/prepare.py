"""Everything between a command and its first step: what is built, where it goes on, and who is told.

The order is that in which data flow; a run directory is only written once it is known that this run fits it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from pretrain import checkpoint, runfile
from pretrain.bottleneck import Setting, cache_warnings
from pretrain.build import build_pretrainer, build_tokenizer, feeds_in, train_only, trained_in
from pretrain.cli import Command
from pretrain.config import Run
from pretrain.curriculum import Curriculum
from pretrain.data import Data
from pretrain.distributed import Ranks
from pretrain.elastic import check_ranks
from pretrain.ema import Ema
from pretrain.explain import remarks, summary
from pretrain.flops import StepFlops
from pretrain.health import Health
from pretrain.ledger import Ledger
from pretrain.lineage import changes, keep, known, unlike_kept
from pretrain.optim import build_optimizer
from pretrain.parallel import Wrapped, wrap
from pretrain.precision import Compute, compute_for, keep_in_bf16
from pretrain.pretrainer import Pretrainer
from pretrain.quarantine import Quarantine, put_away
from pretrain.rundir import RunDir, open_run, record
from pretrain.sinks import Fanout, Sink
from pretrain.sinks.console import console
from pretrain.sinks.jsonl import JsonLines, cut
from pretrain.sinks.mirrored import Mirrored
from pretrain.starts import record_start
from pretrain.state import Standing, check_begun, goes_on, restore
from pretrain.step import Setup
from pretrain.stopwatch import Stopwatch
from pretrain.training import Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a stage is gone on with from."""

    found: checkpoint.Checkpoint | None
    """None at the very beginning."""
    messages: Sequence[str] = ()
    """What is to be said of checkpoints, on rank zero."""
    changed: Sequence[str] = ()
    """In which settings the run directory was another run's, where that was allowed."""


def find_origin(rundir: RunDir, ranks: Ranks) -> Origin:
    """The newest checkpoint that verifies, as all ranks then know it."""
    messages: list[str] = []
    found = ranks.on_zero(lambda: checkpoint.find(rundir.checkpoints, report=messages.append))
    return Origin(found=found, messages=messages)


def build(
    command: Command,
    curriculum: Curriculum,
    data: Data,
    rundir: RunDir,
    ranks: Ranks,
    stack: ExitStack,
    origin: Origin,
    *,
    stage: str,
) -> Training:
    """Everything the loop works with in a stage, in the order data flows.

    What must be closed goes on the stack. A stage goes on from the last checkpoint of the one before.
    """
    run, found = command.run, origin.found
    compute = compute_for(run.precision, ranks.device)
    tokenizer = build_tokenizer(run, data.feeds, rundir, ranks, say=say)
    pretrainer = build_pretrainer(run, tokenizer, ranks, load=found is None, feeds=data.objectives[stage])
    wrapped, optimizer, ema = _to_train(run, stage, pretrainer, data, ranks, compute)
    kind = run.stages[stage].optim.kind
    standing = Standing(data=known(data.feeds), tokenizer=tokenizer.fingerprint, optimizer=kind)
    if found is not None:
        before = Standing.of(found.state())
        standing, differing = _resume(command, curriculum, data, before, standing, rundir, ranks)
        moments = ranks.on_zero(lambda: goes_on(before, curriculum, stage))
        restore(found.tensors(), pretrainer, optimizer, moments=moments, ema=ema)
    else:
        differing = ranks.on_zero(lambda: unlike_kept(data.feeds, rundir))
    ranks.on_zero(lambda: check_begun(standing, curriculum, stage, rundir))
    changed = list(dict.fromkeys([*origin.changed, *differing]))
    ranks.on_zero(lambda: _record(command, data, rundir, other_data=bool(differing)))
    setting = Setting.of(run, data.feeds, ranks)
    stopwatch = Stopwatch(ranks.device, flops=StepFlops(sights=2 if run.spread.compile else 1))
    stopwatch.attach(pretrainer)
    training = Training(
        run=run,
        feeds=data.feeds,
        val=data.val,
        tokenizer=tokenizer,
        pretrainer=pretrainer,
        setup=Setup(wrapped=wrapped, compute=compute, pool=run.pool, watch=stopwatch),
        optimizer=optimizer,
        ema=ema,
        curriculum=curriculum,
        stage=stage,
        alone=command.stage is not None,
        ranks=ranks,
        rundir=rundir,
        standing=standing,
        stopwatch=stopwatch,
        health=Health(data.meter, setting, ranks, accounts=standing.accounts),
    )
    stack.callback(training.saver.close)
    if ranks.zero:
        _open_records(training, data, changed, stack)
    said = [*origin.messages, *(f"changed since the last start: {words}" for words in changed)]
    for message in [*said, *introduction(command, training, data), *cache_warnings(setting)]:
        training.sink.note(message)
    return training


def _to_train(
    run: Run, stage: str, pretrainer: Pretrainer, data: Data, ranks: Ranks, compute: Compute
) -> tuple[Wrapped, torch.optim.Optimizer, Ema | None]:
    """What the steps of a stage work with, in the order of `pretrain.parallel`."""
    trained_in(pretrainer, run, data.objectives)
    multipliers = train_only(pretrainer, run, stage)
    lanes = run.shuffle.lanes if run.deterministic == "elastic" else None
    if lanes is not None:
        ranks.on_zero(lambda: check_ranks(lanes, ranks.world))
    if run.precision.parameters == "bf16":
        keep_in_bf16(pretrainer)
    wrapped = wrap(pretrainer, ranks, run.spread, bf16=compute.bf16, lanes=lanes)
    optimizer = build_optimizer(pretrainer, run.stages[stage].optim, multipliers)
    return wrapped, optimizer, Ema(pretrainer, decay) if (decay := run.stages[stage].ema) else None


def _resume(
    command: Command,
    curriculum: Curriculum,
    data: Data,
    before: Standing,
    now: Standing,
    rundir: RunDir,
    ranks: Ranks,
) -> tuple[Standing, list[str]]:
    """Where a checkpoint stands with the data that are here now, and in words what of them has changed.

    Raises:
        UserError: something has changed that may not.
    """
    allowed = command.allow_changed
    named = ranks.on_zero(lambda: changes(data.feeds, before, now, rundir, allowed=allowed))
    return now.resumed(before, curriculum, allowed=allowed), named


def _open_records(training: Training, data: Data, changed: Sequence[str], stack: ExitStack) -> None:
    """Open what rank zero writes beside training, and record this start."""
    run, rundir, ranks, standing = training.run, training.rundir, training.ranks, training.standing
    if not rundir.quarantine.exists():
        training.standing = standing.listing_anew()  # only rank zero judges, and saves
    training.quarantine = Quarantine(rundir.quarantine, run.bad, samples_of=data.samples_of)
    stack.callback(training.quarantine.close)
    training.ledger = Ledger(rundir.ledger, ranks=ranks.world, elastic=run.deterministic == "elastic")
    stack.callback(training.ledger.close)
    training.starts = record_start(
        rundir.starts,
        step=standing.step,
        stage=training.stage,
        alone=training.alone,
        done=training.ledger.done,
        ranks=ranks.world,
        device=ranks.device.type,
        changed=changed,
    )
    if changed:
        training.ledger.forget(after=standing.step)
    screen = console(sys.stdout, total=training.curriculum.steps, done=standing.step)
    cut(rundir.faults, after=standing.step)
    sinks: list[Sink] = [screen, JsonLines(rundir.metrics, after=standing.step)]
    if run.wandb.wanted() != "disabled":
        sinks.append(Mirrored(rundir, say=screen.note, hurried=lambda: training.hurried))
    training.sink = Fanout(sinks)
    stack.callback(training.sink.close)


def say(sentence: str) -> None:
    """A line on standard output, at once: before there is a console."""
    sys.stdout.write(f"{sentence}\n")
    sys.stdout.flush()


def claim(command: Command, stack: ExitStack) -> tuple[list[str], str]:
    """Make the run directory ours, until the stack is left.

    Returns:
        In which settings it was another run's, and the token of this start.
    """
    run = command.run
    opened = open_run(
        command.out,
        runfile.dump(run),
        identity=runfile.identity(run),
        budgets=runfile.BUDGETS,
        changeable=runfile.CHANGEABLE,
        allow_changed=command.allow_changed,
    )
    stack.enter_context(opened)
    return list(opened.changed), opened.token


def _record(command: Command, data: Data, rundir: RunDir, *, other_data: bool) -> None:
    """Write the run down, now that it is known that its budgets fit what was trained."""
    if other_data:
        put_away(rundir.quarantine)
    record(rundir, runfile.dump(command.run), identity=runfile.identity(command.run))
    keep(data.feeds, rundir)


def introduction(command: Command, training: Training, data: Data) -> list[str]:
    """What will happen, in a few lines."""
    run, curriculum, standing = training.run, training.curriculum, training.standing
    stretches = curriculum.of_stage(training.stage)
    here = feeds_in(stretches[0], data.feeds)
    objectives = " + ".join(run.stages[training.stage].objectives or run.objectives)
    begin = f"from step {standing.step}" if standing.step else "from the start"
    where = here[0].source.name if len(here) == 1 else f"{len(here)} sources"
    steps, samples = f"{curriculum.steps} steps", f"{curriculum.samples} samples"
    if len(run.stages) > 1:
        steps = f"stage {training.stage}, steps {stretches[0].begins} to {stretches[0].ends} of {steps}"
        samples = f"{sum((each.last - each.first) * each.batch for each in stretches)} samples"
    return [
        f"{objectives} on {where}: {steps}, {samples}, {begin}",
        f"everything is kept in {command.out}",
        *summary(training.pretrainer),
        *remarks(training.pretrainer),
        *(data.described(stretches[0]) if len(here) > 1 else []),
    ]
