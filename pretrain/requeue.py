"""Giving a Slurm job back to the queue, once; `scontrol` may fail or hang, and the job may not be ours.

A job that ends is over, however it ends: who wants to be started again must say so before. Slurm then ends
what still runs of it and holds it back for two minutes, which is cut short here.
"""

from __future__ import annotations

import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat

from pretrain.place import Job

_FIELD = re.compile(r"(\w+)=(\S*)")
_DURATION = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")
_CALL = 30.0
"""Seconds after which a call that hangs is given up and made again."""
_SOON = 10
"""Seconds after which a requeued job may start: long enough for its processes to end and its nodes to be
cleared, and no longer."""
_GLANCE = 10.0
"""Seconds that a question may take whose answer can wait."""
_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    requeued: bool
    reason: str
    """One sentence."""


def requeue(job: Job, *, bound: float, say: Callable[[str], None]) -> Outcome:
    """Give the job back to the queue.

    Args:
        job: as it was when this process began: once it has been restarted elsewhere, it is not touched.
        bound: seconds after which it is given up.
        say: told of each call that failed.
    """
    end = time.monotonic() + bound
    again = Outcome(True, f"job {job.id} is in the queue again")
    for pause in _pauses():
        state = _show(job.id, end)
        if state is not None:
            if int(state.get("Restarts", "0")) > job.restart or state.get("JobState") == "PENDING":
                if state.get("JobState") == "RUNNING":
                    return Outcome(False, f"job {job.id} runs again elsewhere: it is left to itself")
                return again  # a call that seemed to fail has worked
            if (reason := _refusal(job.id, state)) is not None:
                return Outcome(False, reason)
            failure = _call("scontrol", "requeue", job.id, end=end)
            if isinstance(failure, str):
                return again
        else:
            failure = Failure("it does not say what it knows of the job")
        if time.monotonic() + pause > end:
            return Outcome(
                False,
                f"`scontrol requeue {job.id}` did not work within {bound:g} s ({failure}): "
                "what was trained is saved, submit the same command again",
            )
        say(f"`scontrol requeue {job.id}` did not work ({failure}): again in {pause:g} s")
        time.sleep(pause)
    raise AssertionError("the pauses have no end")


def start_soon(job: str, *, bound: float, seconds: int = _SOON) -> bool:
    """Cut short the two minutes for which Slurm holds a requeued job back; whether that worked.

    The hold begins when the last process of the job has ended, and gives way to a time that is still to come
    by then, so that `now` would be too soon. Seen in Slurm 22.05.

    Args:
        job: its number.
        bound: seconds after which it is given up.
        seconds: after which it may start.
    """
    end = time.monotonic() + bound
    while time.monotonic() < end:
        if isinstance(_call("scontrol", "update", f"JobId={job}", f"StartTime=now+{seconds}", end=end), str):
            return True
        time.sleep(0.5)
    return False


def seconds_left(job: str) -> float | None:
    """Until the time limit of a job; endless where it has none, None where Slurm does not say."""
    said = _call("squeue", "--noheader", "--format=%L", "--jobs", job, end=time.monotonic() + _GLANCE)
    if not isinstance(said, str) or not (_DURATION.fullmatch(said.strip()) or said.strip() == "UNLIMITED"):
        return None
    return _seconds(said.strip())


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call did not work."""

    reason: str

    def __str__(self) -> str:
        return self.reason


def _refusal(job: str, state: dict[str, str]) -> str | None:
    """Why the job may not or should not go back, if so."""
    if _is_cancelled(state):
        return f"job {job} was cancelled: it stays so"
    if state.get("BatchFlag") == "0":
        return f"job {job} has no batch script that could be started again: start the same command again"
    if state.get("Requeue") == "0":
        return f"job {job} may not be requeued: submit it with --requeue, or submit it again"
    return None


def _is_cancelled(state: dict[str, str]) -> bool:
    """Whether a user ended it. Until it has ended it is COMPLETING, as one is after its time limit."""
    if state.get("JobState") == "COMPLETING":
        return _seconds(state.get("RunTime", "")) < _seconds(state.get("TimeLimit", ""))
    return state.get("JobState") == "CANCELLED"


def _seconds(duration: str) -> float:
    """Of [[DAYS-]HH:]MM:SS; endless for a word, such as UNLIMITED."""
    match = _DURATION.fullmatch(duration)
    if match is None:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _show(job: str, end: float) -> dict[str, str] | None:
    said = _call("scontrol", "show", "job", "-o", job, end=end)
    return dict(_FIELD.findall(said)) if isinstance(said, str) else None


def _call(*words: str, end: float) -> str | Failure:
    """What a command of Slurm prints, or why it did not work."""
    left = max(0.1, min(_CALL, end - time.monotonic()))
    try:
        called = subprocess.run(words, capture_output=True, text=True, timeout=left, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Failure(f"no answer in {left:.0f} s")
    except OSError as error:
        return Failure(error.strerror or str(error))
    if called.returncode:
        return Failure(" ".join(called.stderr.split()) or f"code {called.returncode}")
    return called.stdout


def _pauses() -> Iterator[float]:
    return chain(_PAUSES, repeat(_PAUSES[-1]))
