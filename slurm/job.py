"""What submitit starts on the first node of a job: it becomes the commands that it was given.

submitit's own handlers would requeue a job from within a signal handler, after a checkpoint that one rank
takes alone, three times at most. So nothing of submitit stays in memory: the supervisor takes the place of
its process, and everything after that is as in the batch scripts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

INTERRUPTED = 75
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


@dataclass(frozen=True, slots=True)
class Job:
    """Commands that follow each other in one job. Plain strings: a requeued job reads them again."""

    commands: tuple[tuple[str, ...], ...]

    def __call__(self) -> None:
        """Run the commands; the last one takes the place of this process.

        Those before it do so whatever came of one another: each finds out from its run directory whether it
        can do its part. Only an interruption ends all of them, also one that comes between two.
        """
        noted: list[int] = []
        running: list[subprocess.Popen[bytes]] = []

        def meet(number: int, _: FrameType | None) -> None:
            noted.append(number)
            for process in running:
                process.send_signal(number)

        for number in _SIGNALS:
            signal.signal(number, meet)
        for command in self.commands[:-1]:
            running[:] = [subprocess.Popen(command)]
            if noted:
                running[0].send_signal(noted[0])
            if running[0].wait() == INTERRUPTED or noted:
                sys.exit(INTERRUPTED)
        last = self.commands[-1]
        sys.stdout.flush()
        sys.stderr.flush()
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # until the supervisor has its own
        if noted:
            sys.exit(INTERRUPTED)
        os.execvp(last[0], last)


def supervised(launcher: Sequence[str], arguments: Sequence[str], *, out: str) -> tuple[str, ...]:
    """The command that trains and is started again after a crash.

    Args:
        launcher: what starts the processes: srun, torchrun, or nothing but Python.
        arguments: those of `pretrain.launch`.
        out: the run directory.
    """
    supervisor = (sys.executable, "-m", "pretrain.supervise", "--out", out, "--")
    return (*supervisor, *launcher, "-m", "pretrain.launch", *arguments, "--out", out)
