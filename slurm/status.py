"""How runs are doing: `python -m slurm.status RUN_DIR [RUN_DIR ...]`, `--json` for programs.

Reads the files of each directory, and asks Slurm about its jobs where there is one. Nothing is written or
locked, and torch is not imported. Exit codes: 0 done, 2 the user can mend it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets.commands import run
from datasets.errors import UserError
from slurm import jobs
from slurm.progress import Progress, read_progress
from slurm.scheduler import Queued, ask

_BREATH = 60
"""Seconds after the end of a stage in which the next one may begin."""
_SILENT = 600
"""Seconds without a step after which a run that nobody vouches for is taken to be dead."""
_BESIDE = ("code", "slurm")
"""What a submission keeps beside the runs of a sweep, where a glob finds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One run, as it is printed. Seconds everywhere; None for what is not known."""

    run: str
    state: str
    """finished, running, waiting, interrupted, failed, stopped or silent."""
    why: str
    """What it waits for, or how it ended."""
    jobs: tuple[str, ...]
    """Slurm jobs that run or wait, or the process on this machine."""
    stage: str
    step: int
    steps: int
    samples_per_second: float | None
    seconds_left: float | None
    until: str
    """The stage whose end that is; empty for the last one."""
    silent_for: float | None
    """Since the last step."""
    restarts: int
    lost_steps: int
    error: str
    """How the last start that failed ended."""
    error_age: float | None
    checkpoint: int | None
    checkpoint_age: float | None
    log: str


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m slurm.status", description="How runs are doing.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="directory of a run, or of a sweep"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    wrong: list[UserError] = []
    found = statuses(options.runs, now=time.time(), refuse=wrong.append)
    if options.json:
        sys.stdout.writelines(json.dumps(asdict(each)) + "\n" for each in found)
    elif found:
        from slurm.sheet import show

        show(found)
    sys.stdout.flush()
    sys.stderr.writelines(f"error: {error}\n" for error in wrong)
    return 2 if wrong else 0


def _raise(error: UserError) -> None:
    raise error


def statuses(
    runs: Sequence[Path], *, now: float, refuse: Callable[[UserError], None] = _raise
) -> list[Status]:
    """What is known of each run.

    Args:
        runs: their directories, or those that they lie in.
        now: Unix seconds.
        refuse: takes what is to be said of one that is none, or that cannot be read.
    """
    read: list[tuple[Path, Progress, list[jobs.Submitted]]] = []
    for root in runs:
        below = [root] if _is_run(root) else [path for path in sorted(root.glob("*/")) if _is_run(path)]
        if not below and not _is_beside(root):
            why = "it has no run.yaml, nor jobs that were submitted" if root.exists() else "it does not exist"
            refuse(UserError(f"{root} is no run directory: {why}"))
        for found in below:
            try:
                read.append((found, read_progress(found), list(jobs.read(found))))
            except UserError as error:
                refuse(error)
    queue = ask(job for _, progress, handed in read for job in _ids(progress, handed))
    return [_status(root, progress, handed, queue, now) for root, progress, handed in read]


def _is_run(root: Path) -> bool:
    return any((root / name).exists() for name in ("run.yaml", "jobs.jsonl", "attempts.jsonl"))


def _is_beside(root: Path) -> bool:
    return root.name in _BESIDE and any(_is_run(path) for path in root.parent.glob("*/"))


def _ids(progress: Progress, handed: Sequence[jobs.Submitted]) -> list[str]:
    """The jobs that may still run: those that were submitted, and the one that last started it."""
    mine = [each.job for each in handed if each.executor == "slurm"]
    return [*mine, *[each.job for each in progress.events[-1:] if each.job]]


def _status(
    root: Path,
    progress: Progress,
    handed: Sequence[jobs.Submitted],
    queue: Mapping[str, Queued] | None,
    now: float,
) -> Status:
    live = _known(progress, handed, queue, live=True)
    state, why = _state(progress, handed, queue, now)
    until = progress.until
    error = progress.error
    return Status(
        run=str(root),
        state=state,
        why=why,
        jobs=tuple(each.job for each in live) or _local(handed),
        stage=progress.stage,
        step=progress.step,
        steps=progress.steps,
        samples_per_second=progress.samples_per_second,
        seconds_left=None if progress.done or until in progress.finished else progress.seconds_left,
        until=until,
        silent_for=None if progress.active is None else now - progress.active,
        restarts=progress.cost.restarts,
        lost_steps=progress.cost.lost_steps,
        error=f"code {error.code}{f': {error.reason}' if error.reason else ''}" if error else "",
        error_age=now - error.time if error else None,
        checkpoint=progress.checkpoint,
        checkpoint_age=None if progress.saved is None else now - progress.saved,
        log=handed[-1].log if handed else "",
    )


def _state(
    progress: Progress, handed: Sequence[jobs.Submitted], queue: Mapping[str, Queued] | None, now: float
) -> tuple[str, str]:
    """In a word, and why."""
    if progress.done:
        return "finished", ""
    return (
        _queued(_known(progress, handed, queue, live=True))
        or _here(progress, handed)
        or _ended(progress)
        or _forgotten(progress, handed, queue)
        or _seen(progress, now, unasked=bool(_ids(progress, handed)))
    )


def _queued(live: Sequence[Queued]) -> tuple[str, str] | None:
    """As the scheduler has it."""
    running = [each for each in live if each.state in ("RUNNING", "COMPLETING")]
    if running:
        return "running", f"{running[0].left} to its limit"
    if live:
        why = live[0].reason or live[0].state
        return "waiting", f"{why}{f', expected {live[0].begins}' if live[0].begins else ''}"
    return None


def _here(progress: Progress, handed: Sequence[jobs.Submitted]) -> tuple[str, str] | None:
    """In a process of this machine, which may train several runs, one after the other."""
    process = _local(handed)
    if not process:
        return None
    mine = [each for each in handed if each.job == handed[-1].job]
    events = [each.event for each in progress.events if each.time >= mine[0].time]
    if events and events[-1] in ("start", "restart"):
        return "running", "on this machine"
    waits = events.count("end") - events.count("restart") < len(mine)
    return ("waiting", f"for its turn in process {process[0]}") if waits else None


def _ended(progress: Progress) -> tuple[str, str] | None:
    """As its supervisor has seen it end."""
    last = progress.events[-1] if progress.events else None
    if last is None or last.event in ("start", "restart"):
        return None
    if last.code == 0:
        return "stopped", f"finished so far: {', '.join(progress.finished) or 'nothing'}"
    failed = last.event == "give up" or last.code not in (None, 75)
    return "failed" if failed else "interrupted", last.reason


def _forgotten(
    progress: Progress, handed: Sequence[jobs.Submitted], queue: Mapping[str, Queued] | None
) -> tuple[str, str] | None:
    """With the last of its jobs, of which there may be nothing left."""
    if queue is None or not _ids(progress, handed):
        return None
    over = _known(progress, handed, queue, live=False)
    return "stopped", f"job {over[-1].job} is {over[-1].state}" if over else "Slurm knows its job no more"


def _seen(progress: Progress, now: float, *, unasked: bool) -> tuple[str, str]:
    """By its files alone; `unasked` where Slurm would know more."""
    more = "no Slurm answers here" if unasked else ""
    if unasked and not (progress.active or progress.begun):
        return "silent", f"not begun; {more}"
    silent = now - (progress.active or progress.begun)
    if silent > _BREATH and progress.finished and progress.step == progress.stages[progress.finished[-1]]:
        return "stopped", f"finished so far: {', '.join(progress.finished)}"
    if silent < _SILENT:
        return "running", more
    return "silent", f"no step for ten minutes{more and f'; {more}'}"


def _known(
    progress: Progress, handed: Sequence[jobs.Submitted], queue: Mapping[str, Queued] | None, *, live: bool
) -> list[Queued]:
    """What Slurm says of its jobs, each once."""
    found = (queue[job] for job in _ids(progress, handed) if queue and job in queue)
    return list(dict.fromkeys(each for each in found if each.live == live))


def _local(handed: Sequence[jobs.Submitted]) -> tuple[str, ...]:
    """The process on this machine that trains it, if it is alive."""
    if not handed or handed[-1].executor != "local" or handed[-1].host != os.uname().nodename:
        return ()
    command = Path("/proc", handed[-1].job, "cmdline")
    alive = command.exists() and b"submitit" in command.read_bytes()  # the id may be another's by now
    return (handed[-1].job,) if alive else ()


if __name__ == "__main__":
    run(main)
