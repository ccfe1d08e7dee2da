"""Train: `python -m pretrain.launch --objectives itc,lm`, or the same under torchrun.

Reads the command line, builds everything in the order data flows, trains from where the run stands, and
says what came of it. Exit codes: 0 done, 75 interrupted and saved, 2 the user can mend
it, 70 it hung, anything else a crash.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace

from pretrain import fencing, preempt
from pretrain.preempt import Preemption

PREEMPTION = Preemption()
if __name__ == "__main__":  # before torch, whose import takes seconds in which a signal would lose the job
    PREEMPTION.__enter__()

# Two idle OpenMP threads that spin steal the cores from the threads that read ahead. Read once, by torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from datasets.commands import run
from datasets.errors import UserError
from datasets.shards.tars import Tars
from pretrain.cli import Command, parse
from pretrain.clock import Clock
from pretrain.config import Run
from pretrain.curriculum import Curriculum
from pretrain.data import Data, open_data
from pretrain.distributed import Ranks, RankZeroFailedError, SaidByRankZeroError, join_ranks
from pretrain.evaluate import during
from pretrain.explain import explain
from pretrain.finish import already, show, unfinished
from pretrain.flops import matmul_peak
from pretrain.lineage import check_ranks
from pretrain.loop import check, rehearsal, train
from pretrain.place import alone_among, place_here
from pretrain.prepare import Origin, build, claim, find_origin, say
from pretrain.rendezvous import LeftError, RendezvousError
from pretrain.rundir import RunDir
from pretrain.threads import settle_threads
from pretrain.verdict import Verdict, give
from pretrain.watchdog import Watchdog

DONE, CRASH, USER_ERROR, INTERRUPTED = 0, 1, 2, 75
_COMPILING = 600.0
"""Seconds that a step with torch.compile may take."""
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def main(arguments: Sequence[str], preemption: Preemption | None = None) -> int:
    """Run a command line; returns the exit code.

    Args:
        arguments: without the program's name.
        preemption: where signals are noted already; by default from now on.
    """
    try:
        command = _parsed(arguments)
        if preemption is not None and (command.explain or command.plan is not None):
            preemption.__exit__()  # there is nothing to save: a signal ends it as it ends any program
        return _plan(command) if command.plan is not None else _joined(command, preemption)
    except LeftError:
        give(Verdict(code=INTERRUPTED, reason="asked to stop before all ranks had come"))
        return INTERRUPTED
    except SaidByRankZeroError:
        return USER_ERROR
    except (fencing.FencedError, RankZeroFailedError) as error:
        sys.stderr.write(f"rank {place_here().rank}: {error}\n")
        return CRASH
    except Exception as error:
        code = _told(error)
        if code is None:
            raise
        return code


def _told(error: Exception) -> int | None:
    """Say in a sentence why this rank leaves, and its exit code; None for a crash that is its own."""
    mine = _verdict(error)
    first = give(mine)
    if mine.code == USER_ERROR or isinstance(error, RendezvousError):
        sys.stderr.write(f"error: {mine.reason}\n")
        return mine.code
    if first == mine:
        return None
    # Its end closed our connections: what is raised here is only that.
    sys.stderr.write(f"rank {mine.rank}: leaves because of rank {first.rank}: {first.reason}\n")
    return first.code


def _parsed(arguments: Sequence[str]) -> Command:
    """The command, which tyro may refuse in words of its own."""
    try:
        return parse(arguments)
    except SystemExit as refusal:
        if refusal.code == USER_ERROR:
            give(Verdict(code=USER_ERROR, reason="the command line was refused", rank=place_here().rank))
        raise


def _plan(command: Command) -> int:
    """Print what the run would take; no other rank is needed."""
    from pretrain.plan.command import plan

    sys.stdout.writelines(f"{line}\n" for line in plan(command))
    return DONE


def _joined(command: Command, preemption: Preemption | None) -> int:
    """Run among all ranks."""
    with (
        Preemption() if preemption is None else nullcontext(preemption) as preemption,
        join_ranks(command.out, asked=preemption.asked) as ranks,
    ):
        if sentence := alone_among():
            say(sentence)
        with _spoken():
            code = launch(command, ranks, preemption)
        if code == INTERRUPTED:
            give(Verdict(code=code, reason=f"{preemption.requested or 'another rank'} asked to stop"))
        ranks.wait()  # srun ends all tasks as soon as one has left with another code than 0
        return code


@contextmanager
def _spoken() -> Generator[None]:
    """Who fails says so before its connections close, which is all that the others would know."""
    try:
        yield
    except (SaidByRankZeroError, RankZeroFailedError, fencing.FencedError):
        raise
    except Exception as error:
        give(_verdict(error))
        raise


def _verdict(error: Exception) -> Verdict:
    rank = place_here().rank
    if isinstance(error, UserError):
        code = CRASH if isinstance(error, RendezvousError) else USER_ERROR  # worth another try
        return Verdict(code=code, reason=str(error), rank=rank)
    if isinstance(error, OSError) and error.errno in _STORAGE:
        where = error.filename or "the run directory"
        return Verdict(code=USER_ERROR, reason=f"{error.strerror}: {where}", rank=rank)
    words = " ".join(str(error).split()) or "no more is known"
    return Verdict(code=CRASH, reason=f"{type(error).__name__}: {words}", rank=rank)


def launch(command: Command, ranks: Ranks, preemption: Preemption) -> int:
    """Build what the run describes, train it, and judge it."""
    curriculum = Curriculum(command.run.stages)
    with ExitStack() as stack:
        data = open_data(command.run, say=say if ranks.zero else None)
        stack.callback(data.close)
        check_ranks(data.feeds, ranks)
        if command.explain:
            for line in explain(command, curriculum, data, ranks):
                sys.stdout.write(f"{line}\n" if ranks.zero else "")
            return DONE
        rundir = RunDir(command.out)
        changed, token = ranks.on_zero(lambda: claim(command, stack))
        fencing.hold(command.out, token)
        stack.callback(fencing.leave, command.out, token)
        origin = find_origin(rundir, ranks)
        step = origin.found and origin.found.step
        stages = ranks.on_zero(lambda: unfinished(rundir, curriculum, step=step, stage=command.stage))
        if not stages and ranks.zero:
            say(already(command))
        for place, stage in enumerate(stages):
            if _stops(ranks, preemption):
                return INTERRUPTED
            origin = find_origin(rundir, ranks) if place else replace(origin, changed=changed)
            code = train_stage(command, curriculum, data, rundir, ranks, preemption, origin, stage=stage)
            if code != DONE:
                return code
        if stages and ranks.zero and command.stage not in (None, list(curriculum.stages)[-1]):
            say(already(command))
        return DONE


def train_stage(
    command: Command,
    curriculum: Curriculum,
    data: Data,
    rundir: RunDir,
    ranks: Ranks,
    preemption: Preemption,
    origin: Origin,
    *,
    stage: str,
) -> int:
    """Build everything for a stage, train it to its end, and judge it; returns the exit code."""
    run = command.run
    with ExitStack() as stack:
        with _watchdog(run, data, rundir, ranks, stage=stage) as watchdog:
            training = build(command, curriculum, data, rundir, ranks, stack, origin, stage=stage)
            if _stops(ranks, preemption):
                return INTERRUPTED
            check(training)
            during.check(training)
            measured = ranks.group is None and ranks.device.type == "cpu"
            step = rehearsal(training) if measured else None
            # Bits follow their number.
            threads = run.precision.threads or int(run.deterministic == "elastic")
            settle_threads(threads, kept=rundir.threads, step=step)
            training.stopwatch.peak = matmul_peak(training.setup.compute)
            training.stopwatch.take()  # what was rehearsed was no step
            training.clock, training.asked = Clock(watch=watchdog), preemption.asked
            outcome = train(training, preemption)
        # Whoever ends a job gives it seconds: pages can be written any time, and what is saved can be seen.
        training.hurried = outcome == "interrupted" and preemption.requested != "SIGINT"
        if not training.hurried:
            show(training)
        if outcome == "interrupted":
            training.sink.note(
                f"{preemption.requested or 'another rank'} asked to stop: step {training.standing.step} is "
                f"saved in {command.out}; the same command goes on from there"
            )
            return INTERRUPTED
        return DONE


def _watchdog(run: Run, data: Data, rundir: RunDir, ranks: Ranks, *, stage: str) -> Watchdog:
    """Who ends this rank when its building or its steps no longer end."""
    remote = any(isinstance(feed.source, Tars) and feed.source.remote for feed in data.feeds)
    least = max(
        run.watchdog.least + (run.remote.deadline if remote else 0.0),
        _COMPILING if run.spread.compile else 0.0,  # also in a later step, for a shape it has not met
    )
    most = run.watchdog.most
    return Watchdog(rundir.root, rank=ranks.rank, world=ranks.world, least=least, most=most, stage=stage)


def _stops(ranks: Ranks, preemption: Preemption) -> bool:
    """Whether any rank was asked to stop, before anything was trained that could be lost."""
    asked = torch.tensor([float(preemption.asked())], device=ranks.device)
    return bool(ranks.sum(asked) > 0)


def _main(arguments: Sequence[str]) -> int:
    """As a process of its own: a signal that comes when all is done changes nothing."""
    code = main(arguments, PREEMPTION)
    preempt.ignore()
    return code


if __name__ == "__main__":
    run(_main)
