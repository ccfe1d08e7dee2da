"""Train: `python -m pretrain.launch --objectives itc,lm`, or the same under torchrun.

Reads the command line, builds everything in the order data flows, trains from where the run stands, and
says what came of it. Exit codes: 0 done, 75 interrupted and saved, 2 the user can mend it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack

# Two idle OpenMP threads that spin steal the cores from the threads that read ahead. Read once, by torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from datasets.errors import UserError
from pretrain.cli import Command, parse
from pretrain.clock import Clock
from pretrain.curriculum import Curriculum
from pretrain.data import open_data
from pretrain.distributed import Ranks, SaidByRankZeroError, join_ranks
from pretrain.evaluate import during
from pretrain.explain import explain
from pretrain.finish import is_finished, show
from pretrain.flops import matmul_peak
from pretrain.lineage import check_ranks
from pretrain.loop import check, rehearsal, train
from pretrain.preempt import Preemption
from pretrain.prepare import build, claim, say
from pretrain.rundir import RunDir
from pretrain.threads import settle_threads

DONE, USER_ERROR, INTERRUPTED = 0, 2, 75
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    try:
        command = parse(arguments)
        with join_ranks() as ranks, Preemption() as preemption:
            return launch(command, ranks, preemption)
    except SaidByRankZeroError:
        return USER_ERROR
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        sys.stderr.write(f"error: {error.strerror}: {error.filename or 'the run directory'}\n")
    return USER_ERROR


def launch(command: Command, ranks: Ranks, preemption: Preemption) -> int:
    """Build what the run describes, train it, and judge it."""
    run, curriculum = command.run, Curriculum(command.run.stages)
    with ExitStack() as stack:
        data = open_data(run, say=say if ranks.zero else None)
        stack.callback(data.close)
        check_ranks(data.feeds, ranks)
        if command.explain:
            for line in explain(command, curriculum, data, ranks):
                sys.stdout.write(f"{line}\n" if ranks.zero else "")
            return DONE
        rundir = RunDir(command.out)
        changed = ranks.on_zero(lambda: claim(command, stack))
        if is_finished(rundir, curriculum):
            if ranks.zero:
                sys.stdout.write(f"{command.out} is finished; a larger --stages.NAME.steps goes on with it\n")
            return DONE
        training = build(command, curriculum, data, rundir, ranks, stack, changed=changed)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
