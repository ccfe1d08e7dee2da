"""Train: `python -m pretrain.launch --objectives itc,lm`, or the same under torchrun.

Reads the command line, builds everything in the order data flows, trains from where the run stands, and
says what came of it. Exit codes: 0 done, 75 interrupted and saved, 2 the user can mend it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext

from pretrain import fencing, preempt
from pretrain.preempt import Preemption

PREEMPTION = Preemption()
if __name__ == "__main__":  # before torch, whose import takes seconds in which a signal would lose the job
    PREEMPTION.__enter__()

# Two idle OpenMP threads that spin steal the cores from the threads that read ahead. Read once, by torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from datasets.errors import UserError
from pretrain.cli import Command, parse
from pretrain.clock import Clock
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
from pretrain.prepare import build, claim, say
from pretrain.rendezvous import LeftError
from pretrain.rundir import RunDir
from pretrain.threads import settle_threads
from pretrain.verdict import Verdict, give

DONE, CRASH, USER_ERROR, INTERRUPTED = 0, 1, 2, 75
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def main(arguments: Sequence[str], preemption: Preemption | None = None) -> int:
    """Run a command line; returns the exit code.

    Args:
        arguments: without the program's name.
        preemption: where signals are noted already; by default from now on.
    """
    try:
        command = parse(arguments)
        return _plan(command) if command.plan is not None else _joined(command, preemption)
    except LeftError:
        give(Verdict(code=INTERRUPTED, reason="asked to stop before all ranks had come"))
        return INTERRUPTED
    except SaidByRankZeroError:
        return USER_ERROR
    except UserError as error:
        return _mistake(str(error))
    except (fencing.FencedError, RankZeroFailedError) as error:
        sys.stderr.write(f"rank {place_here().rank}: {error}\n")
        return CRASH
    except OSError as error:
        if error.errno not in _STORAGE:
            _crash(error)
            raise
        return _mistake(f"{error.strerror}: {error.filename or 'the run directory'}")
    except Exception as error:
        _crash(error)
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
        code = launch(command, ranks, preemption)
        if code == INTERRUPTED:
            give(Verdict(code=code, reason=f"{preemption.requested or 'another rank'} asked to stop"))
        ranks.wait()  # srun ends all tasks as soon as one has left with another code than 0
        return code


def _mistake(sentence: str) -> int:
    sys.stderr.write(f"error: {sentence}\n")
    give(Verdict(code=USER_ERROR, reason=sentence, rank=place_here().rank))
    return USER_ERROR


def _crash(error: Exception) -> None:
    give(Verdict(code=CRASH, reason=f"{type(error).__name__}: {error}", rank=place_here().rank))


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
        stages = ranks.on_zero(lambda: unfinished(rundir, curriculum, stage=command.stage))
        if not stages and ranks.zero:
            say(already(command))
        for stage in stages:
            if _stops(ranks, preemption):
                return INTERRUPTED
            code = train_stage(
                command, curriculum, data, rundir, ranks, preemption, stage=stage, changed=changed
            )
            if code != DONE:
                return code
            changed = []
        return DONE


def train_stage(
    command: Command,
    curriculum: Curriculum,
    data: Data,
    rundir: RunDir,
    ranks: Ranks,
    preemption: Preemption,
    *,
    stage: str,
    changed: Sequence[str],
) -> int:
    """Build everything for a stage, train it to its end, and judge it; returns the exit code."""
    run = command.run
    with ExitStack() as stack:
        training = build(command, curriculum, data, rundir, ranks, stack, stage=stage, changed=changed)
        if _stops(ranks, preemption):
            return INTERRUPTED
        check(training)
        during.check(training)
        measured = ranks.group is None and ranks.device.type == "cpu"
        step = rehearsal(training) if measured else None
        threads = run.precision.threads or int(run.deterministic == "elastic")  # bits follow their number
        settle_threads(threads, kept=rundir.threads, step=step)
        training.stopwatch.peak = matmul_peak(training.setup.compute)
        training.stopwatch.take()  # what was rehearsed was no step
        training.clock = Clock()
        outcome = train(training, preemption)
        show(training)
        if outcome == "interrupted":
            training.sink.note(
                f"{preemption.requested or 'another rank'} asked to stop: step {training.standing.step} is "
                f"saved in {command.out}; the same command goes on from there"
            )
            return INTERRUPTED
        return DONE


def _stops(ranks: Ranks, preemption: Preemption) -> bool:
    """Whether any rank was asked to stop, before anything was trained that could be lost."""
    asked = torch.tensor([float(preemption.asked())], device=ranks.device)
    return bool(ranks.sum(asked) > 0)


if __name__ == "__main__":
    done = main(sys.argv[1:], PREEMPTION)
    preempt.ignore()
    sys.exit(done)
