"""Send a run directory to W&B: `python -m pretrain.mirror RUN_DIR`, at any time, as often as one likes.

It sends what W&B lacks and ends. Training starts it with `--follow`: then it sends what is reported until its
standard input ends, which it does however training ends.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, TextIO

from datasets.commands import run
from datasets.errors import UserError
from pretrain.mirror.reach import answers
from pretrain.mirror.rows import ReplacedError, Rows
from pretrain.mirror.upload import begin, forget
from pretrain.preempt import SIGNALS
from pretrain.rundir import RunDir
from pretrain.sinks.mirrored import Wandb, settings_of

DONE, USER_ERROR = 0, 2
_POLL_SECONDS = 1.0
_NICENESS = 10
_TRIES = 3
_CLAIMS, _CLAIM_SECONDS = 40, 0.25


class Caller(Protocol):
    """Who wants the mirror."""

    pid: int | None
    """The process that trains."""

    def ended(self) -> bool:
        """Whether nothing more will be reported; takes a moment."""
        ...

    def say(self, text: str) -> None:
        """A sentence for the user."""
        ...

    def release(self) -> None:
        """Waiting for the mirror has no use any more."""
        ...


class User:
    """Someone who typed the command, for a run as it stands."""

    pid: int | None = None

    def ended(self) -> bool:
        """It has."""
        return True

    def say(self, text: str) -> None:
        """Write to standard output."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def release(self) -> None:
        """They wait as long as they like."""


class Trainer:
    """The process that trains: it holds our standard input, and reads our standard output."""

    def __init__(self) -> None:
        self.pid: int | None = os.getppid()
        # Its end of the pipe sees the end when we close ours, so nobody else may hold or write to it.
        self._words: int | None = os.dup(1)
        os.dup2(2, 1)

    def ended(self) -> bool:
        """Wait for the end of standard input, but not for long."""
        ready, _, _ = select.select([0], [], [], _POLL_SECONDS)
        return bool(ready) and not os.read(0, 1)

    def say(self, text: str) -> None:
        """Write a line, to the log too; nobody may be there any more."""
        sys.stderr.write(f"{text}\n")
        with suppress(BrokenPipeError):
            if self._words is not None:
                os.write(self._words, f"{text}\n".encode())

    def release(self) -> None:
        """Close its pipe."""
        if self._words is not None:
            os.close(self._words)
            self._words = None


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.mirror", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="directory of a run, trained or in training")
    parser.add_argument("--mode", choices=("auto", "online", "offline"), help="instead of the run's own")
    parser.add_argument("--follow", action="store_true", help="until standard input ends")
    options = parser.parse_args(arguments)
    caller: Caller = User()
    if options.follow:
        caller = Trainer()
        os.nice(_NICENESS)
        for number in (*SIGNALS, signal.SIGHUP):
            # A scheduler's are meant for the training; when that ends we do.
            signal.signal(number, signal.SIG_IGN)
    try:
        mirror(RunDir(options.run_dir), caller, mode=options.mode)
    except UserError as error:
        if options.follow:
            caller.say(f"W&B: {error}")
            return DONE
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    return DONE


def mirror(rundir: RunDir, caller: Caller, *, mode: str | None = None) -> None:
    """Mirror a run directory until its caller has ended.

    Raises:
        UserError: it is no run directory, or another process mirrors it.
    """
    settings = _settings(rundir, mode)
    with _claim(rundir, caller):
        lost = 0
        while True:
            try:
                return _session(rundir, settings, caller)
            except ReplacedError:
                continue
            except ConnectionError:
                # W&B's own process is gone, as by a signal to all of a job; the records are still there.
                forget()
                lost += 1
                if lost == _TRIES:
                    raise


def _session(rundir: RunDir, settings: Wandb, caller: Caller) -> None:
    """From the first record to the end.

    Raises:
        ReplacedError: the records were replaced: what was sent is to be compared with them anew.
        ConnectionError: the W&B client has lost what it was sent.
    """
    rows = Rows(rundir.metrics)
    ready = list(rows.new())
    upload = begin(rundir, settings, last=rows.last_step, trainer=caller.pid, say=caller.say)
    try:
        for row in ready:
            upload.send(row)
        ended = False
        while not ended:
            ended = caller.ended()
            for row in rows.new(ended=ended):
                upload.send(row)
        if caller.pid is not None and upload.server is not None and not answers(upload.server):
            caller.say(
                f"W&B: {upload.server} does not answer any more: tried for some minutes, in the background; "
                f"`python -m pretrain.mirror {rundir.root}` sends what it lacks"
            )
            caller.release()
    finally:
        upload.finish()


def _settings(rundir: RunDir, mode: str | None) -> Wandb:
    if find_spec("wandb") is None:
        raise UserError("the package wandb is not installed: pip install wandb")
    settings = settings_of(rundir)
    settings = settings if mode is None else replace(settings, mode=mode)
    if settings.wanted() == "disabled":
        raise UserError(f"W&B is disabled for {rundir.root}: add --mode online, or --mode offline")
    return settings


def _claim(rundir: RunDir, caller: Caller) -> TextIO:
    """The only mirror of this directory, until the result is closed or the process dies."""
    try:
        rundir.wandb.mkdir(exist_ok=True)
        lock = (rundir.wandb / "lock").open("a")
    except OSError as error:
        raise UserError(f"{rundir.wandb} cannot be written ({error.strerror})") from error
    for _ in range(_CLAIMS):
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        if caller.pid is None:
            raise UserError(f"another process mirrors {rundir.root}: it sends all that this one would")
        time.sleep(_CLAIM_SECONDS)
    caller.say(
        "W&B: the mirror of an earlier start still uploads; this one goes on after it, in the background"
    )
    caller.release()
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


if __name__ == "__main__":
    run(main)
