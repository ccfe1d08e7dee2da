"""Keep a run going: `python -m pretrain.supervise -- srun --kill-on-bad-exit=1 COMMAND... --out RUN_DIR`.

Starts the command, and again in place whenever it crashes, unless it crashes without getting on. When it
was interrupted and has saved (75) inside a Slurm job, the job is given back to the queue, once; so it is
shortly before its time limit if it still saves then, because nobody could do that later. On a laptop:
`python -m pretrain.supervise -- torchrun --nproc-per-node 8 -m pretrain.launch --out RUN_DIR`.

Exit codes: those of `pretrain.launch`. 0 done, 75 interrupted and saved, 2 the user can mend it, anything
else a crash that came again and again. What it did stands in RUN_DIR/attempts.jsonl. Standard library only:
it starts in milliseconds, because the first signal may come at once.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Literal

from datasets.commands import run
from datasets.errors import UserError
from pretrain import fencing, verdict
from pretrain.attempts import Event, Kind, note, read_attempts
from pretrain.place import ATTEMPT, Attempt, Job, attempt_here, job_here
from pretrain.requeue import requeue, start_soon
from pretrain.timelimit import MARGIN, TimeLimit

DONE, CRASH, USER_ERROR, INTERRUPTED = 0, 1, 2, 75
_USAGE = "python -m pretrain.supervise [--out RUN_DIR] -- COMMAND..."
BARREN = 3
"""Starts in a row that may end in a crash without a new checkpoint."""
STANDSTILL = 3
"""Times in a row that a job may go back to the queue without a new checkpoint."""
BOUND = "MEDLEY_REQUEUE_SECONDS"
"""The environment variable that says how long `scontrol requeue` is tried."""
_BOUND = 600.0
_FAREWELL = 120.0
"""Seconds that Slurm has to end a job that it has taken back."""
_KILL_WAIT = 30
"""Seconds that Slurm leaves to the processes of such a job, where nobody has configured another time."""
_PAUSE = 1.0
_TRAINING = "pretrain.launch"
_STEP = re.compile(r"step-(\d{8,})")
_PR_SET_PDEATHSIG = 1
Next = Literal["leave", "requeue", "restart", "give up"]


class Signals:
    """Notes signals and passes them on to what runs, in the way that it understands."""

    def __init__(self) -> None:
        self.stop: str | None = None
        """Name of the first signal that came."""
        self.interrupted = False
        """Whether a person pressed Ctrl-C."""
        self.after = False
        """Whether one came since this was last set back."""
        self._to: Callable[[int], None] | None = None
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._meet)

    def to(self, pass_on: Callable[[int], None] | None) -> None:
        """Who is told from now on."""
        self._to = pass_on
        if pass_on is not None and self.stop is not None:
            pass_on(signal.Signals[self.stop])

    def _meet(self, number: int, frame: FrameType | None) -> None:
        self.stop = self.stop or signal.Signals(number).name
        self.interrupted |= number == signal.SIGINT
        self.after = True
        if self._to is not None:
            self._to(number)


class Supervisor:
    """Starts of one command."""

    def __init__(self, command: Sequence[str], out: Path) -> None:
        self._command, self._out = list(command), out
        self._job: Job | None = job_here()
        self._limit = TimeLimit(self._job.id) if self._job else None
        self._returned = False
        self._signals = Signals()
        knows_usr2 = _is_srun(command) or _trains_itself(command)
        self._usr2 = signal.SIGUSR2 if knows_usr2 else signal.SIGTERM
        # Codes of a start that met a signal before it could note it: nothing had been trained yet.
        self._unmet = {128 + signal.SIGTERM, 128 + self._usr2}
        self._noted = self._mute = False
        # One that runs inside another's command numbers its own starts.
        os.environ.pop(ATTEMPT, None)
        self._attempt = attempt_here() or Attempt(job=secrets.token_hex(4), restart=0, number=0)

    def run(self) -> int:
        """Start it until there is nothing more to do; the exit code."""
        barren = 0
        while True:
            self._attempt = replace(self._attempt, number=self._attempt.number + 1)
            os.environ[ATTEMPT] = str(self._attempt)
            before = newest_step(self._out)
            self._note("start")
            code, reason = self._start()
            barren = barren + 1 if newest_step(self._out) <= before else 0
            self._note("end", code=code, reason=reason)
            chosen = self._next(code, barren)
            if chosen == "leave":
                return INTERRUPTED if code in self._unmet else code
            if chosen == "requeue":
                return self._requeue()
            if chosen == "give up":
                self._note("give up", reason=reason)
                say(
                    f"{BARREN} starts in a row ended without a new checkpoint, the last with code {code}"
                    f"{f' ({reason})' if reason else ''}: it is not started again"
                )
                return code
            self._note("restart", reason=reason)
            say(f"it ended with code {code}{f' ({reason})' if reason else ''}: it is started again")
            time.sleep(_PAUSE)

    def _next(self, code: int, barren: int) -> Next:
        """What follows from how it ended."""
        if self._returned:
            return "requeue"
        if code in (DONE, USER_ERROR):
            return "leave"
        stopped = code == INTERRUPTED or code in self._unmet or self._signals.stop is not None
        if stopped:
            wanted = self._job is not None and not self._signals.interrupted
            return "requeue" if wanted else "leave"
        return "give up" if barren >= BARREN else "restart"

    def _start(self) -> tuple[int, str]:
        """Run the command to its end; its exit code, and why in words if anybody said so."""
        said = self._out.absolute() / f"verdict-{self._attempt}.json"
        _remove(said)
        environment = {**os.environ, verdict.VARIABLE: str(said)}
        try:
            process = subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a signal to our group is ours to pass on
                preexec_fn=_end_with(os.getpid()),
            )
        except OSError as error:
            raise UserError(f"{self._command[0]} cannot be started ({error.strerror})") from error
        self._signals.to(lambda number: process.send_signal(self._heard(number)))
        code = self._wait(process)
        self._signals.to(None)
        found = verdict.read(said)
        _remove(said)
        code = code if code >= 0 else 128 - code
        if found is None or code == DONE:
            return code, ""
        where = f"rank {found.rank}: " if found.rank else ""
        return found.code, f"{where}{found.reason}"

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """The code with which it ends. Where the time of the job ends before, that is requeued first."""
        while self._limit is not None:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=self._limit.pause)
            if self._limit.is_near():
                self._limit = None
                if not self._signals.interrupted:
                    self._return_unsaved()
        return process.wait()

    def _return_unsaved(self) -> None:
        """Requeue the job while its command still runs: it has as long as Slurm leaves it to save."""
        assert self._job is not None
        step = newest_step(self._out)
        lost = f"what was trained after step {step}" if step >= 0 else "all that was trained"
        say(
            f"the time limit of job {self._job.id} comes within {MARGIN:g} s and its last save is not done: "
            f"unless that ends in time, {lost} is done again (--signal=USR2@SECONDS warns it earlier)"
        )
        self._signals.after = False
        self._returned = self._hand_back(bound=min(_bound(), MARGIN + _KILL_WAIT))
        if self._returned:  # and may start when the last of it must have ended
            start_soon(self._job.id, bound=MARGIN, seconds=_KILL_WAIT + round(MARGIN))

    def _heard(self, number: int) -> int:
        """The signal as the command should hear it.

        srun only hands USR2 on, at TERM it ends the tasks. torchrun knows TERM alone: it dies of USR2, and
        its ranks live on.
        """
        if _is_srun(self._command):
            return signal.SIGUSR2
        return self._usr2 if number == signal.SIGUSR2 else number

    def _requeue(self) -> int:
        """Requeue the job, unless it is already, and wait to be ended with it."""
        assert self._job is not None
        if not self._returned:
            self._signals.after = False  # Slurm ends us as soon as it has taken the job back
            self._returned = self._hand_back(bound=_bound())
        if self._returned:
            start_soon(self._job.id, bound=_FAREWELL)
            end = time.monotonic() + _FAREWELL
            while not self._signals.after and time.monotonic() < end:
                time.sleep(0.2)
        return INTERRUPTED

    def _hand_back(self, *, bound: float) -> bool:
        """Give the job back to the queue, unless it stands still; whether that worked."""
        assert self._job is not None
        if self._stands_still(self._job):
            reason = (
                f"job {self._job.id} went back to the queue {STANDSTILL} times without a new checkpoint: "
                "submit it again with a longer --time or a shorter warning (--signal=USR2@60)"
            )
            say(reason)
            self._note("give up", reason=reason)
            return False
        outcome = requeue(self._job, bound=bound, say=say)
        say(outcome.reason)
        self._note("requeue" if outcome.requeued else "leave", reason=outcome.reason)
        return outcome.requeued

    def _stands_still(self, job: Job) -> bool:
        """Whether it was requeued so often already where it stands now: another time would change nothing."""
        steps: list[int] = []
        with suppress(OSError):
            events = read_attempts(self._out)
            steps = [each.step for each in events if (each.event, each.job) == ("requeue", job.id)]
        return steps[-STANDSTILL:] == [newest_step(self._out)] * STANDSTILL

    def _note(self, kind: Kind, *, code: int | None = None, reason: str = "") -> None:
        if fencing.is_taken_over(self._out):
            raise fencing.FencedError(
                f"{self._out} was taken over by a later start of job {self._attempt.job}: nothing is done "
                f"here (if there is none, remove {self._out / 'lock'})"
            )
        job = self._job
        event = Event(
            event=kind,
            attempt=str(self._attempt),
            job=job.id if job else "",
            restart=job.restart if job else 0,
            step=newest_step(self._out),
            code=code,
            reason=reason,
        )
        try:
            note(self._out, event)
        except OSError as error:
            if not self._noted:
                raise  # nothing was started yet
            if not self._mute:
                say(f"what happens is no longer noted in {self._out} ({error.strerror}): that ends nothing")
            self._mute = True
        self._noted = True


def newest_step(out: Path) -> int:
    """The newest step with a checkpoint; -1 for none."""
    names: list[re.Match[str] | None] = []
    with suppress(OSError):
        names = [_STEP.fullmatch(path.name) for path in (out / "checkpoints").iterdir()]
    return max((int(match[1]) for match in names if match), default=-1)


def run_directory(command: Sequence[str]) -> Path | None:
    """What the last --out of the training names: srun has options of that name, too."""
    found: str | None = None
    words = command[command.index(_TRAINING) + 1 :] if _TRAINING in command else command
    for place, word in enumerate(words):
        if word == "--out" and place + 1 < len(words):
            found = words[place + 1]
        elif word.startswith("--out="):
            found = word.partition("=")[2]
    return Path(found) if found else None


def _is_srun(command: Sequence[str]) -> bool:
    return Path(command[0]).name == "srun"


def _trains_itself(command: Sequence[str]) -> bool:
    """Whether it is the Python that trains, and no launcher of such."""
    module = command[command.index("-m") + 1 :][:1] if "-m" in command else []
    return Path(command[0]).name.startswith("python") and list(module) == [_TRAINING]


def _remove(file: Path) -> None:
    """If that is possible: its name is used only once."""
    with suppress(OSError):
        file.unlink()


def say(sentence: str) -> None:
    """A line in the log."""
    sys.stderr.write(f"supervise: {sentence}\n")
    sys.stderr.flush()


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    if arguments[:1] in (["--help"], ["-h"]):
        sys.stdout.write(f"usage: {_USAGE}\n\n{__doc__}")
        return DONE
    try:
        own, command = _split(arguments)
        out = run_directory(command) or run_directory(own)
        if out is None:
            raise UserError("name the run directory: --out RUN_DIR in the command, or before `--`")
        out.mkdir(parents=True, exist_ok=True)
        return Supervisor(command, out).run()
    except OSError as error:
        sys.stderr.write(f"error: {error.strerror}: {error.filename}: choose another --out\n")
    except fencing.FencedError as error:
        say(str(error))
        return CRASH
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
    return USER_ERROR


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own flags and the command."""
    given = list(arguments)
    place = given.index("--") if "--" in given else 0
    own, command = given[:place], given[place + ("--" in given) :]
    if not command or (own and run_directory(own) is None):
        raise UserError(f"write: {_USAGE}")
    return own, command


def _bound() -> float:
    said = os.environ.get(BOUND, "")
    try:
        return float(said) if said else _BOUND
    except ValueError:
        raise UserError(f"{BOUND} is {said!r}: set it to seconds, or unset it") from None


def _end_with(supervisor: int) -> Callable[[], None]:
    """What the command does before it begins: ask to be ended when the supervisor is, however that ends."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != supervisor:
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


if __name__ == "__main__":
    run(main)
