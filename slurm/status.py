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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets.errors import UserError
from slurm import jobs
from slurm.progress import Progress, read_progress
from slurm.scheduler import Queued, ask

_BREATH = 60
"""Seconds after the end of a stage in which the next one may begin."""
_SILENT = 600
"""Seconds without a step after which a run that nobody vouches for is taken to be dead."""


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
    try:
        found = statuses(options.runs, now=time.time())
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if options.json:
        sys.stdout.writelines(json.dumps(asdict(each)) + "\n" for each in found)
    else:
        from slurm.sheet import show

        show(found)
    return 0


def statuses(runs: Sequence[Path], *, now: float) -> list[Status]:
    """What is known of each run.

    Args:
        runs: their directories, or those that they lie in.
        now: Unix seconds.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    below = [[root] if _is_run(root) else sorted(root.glob("*/")) for root in runs]
    found = [root for several in below for root in several if _is_run(root)]
    if not found:
        named = " ".join(map(str, runs))
        raise UserError(f"{named} is no run directory: it has no run.yaml, nor jobs that were submitted")
    read = [(root, read_progress(root), list(jobs.read(root))) for root in found]
    queue = ask(job for _, progress, handed in read for job in _ids(progress, handed))
    return [_status(root, progress, handed, queue, now) for root, progress, handed in read]


def _is_run(root: Path) -> bool:
    return any((root / name).exists() for name in ("run.yaml", "jobs.jsonl", "attempts.jsonl"))


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
        seconds_left=None if progress.done else progress.seconds_left,
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
    live = _known(progress, handed, queue, live=True)
    running = [each for each in live if each.state != "PENDING"]
    if running:
        return "running", f"{running[0].left} to its limit"
    if live:
        return "waiting", f"{live[0].reason}{f', expected {live[0].begins}' if live[0].begins else ''}"
    if _local(handed):
        return "running", "on this machine"
    last = progress.events[-1] if progress.events else None
    if last is not None and last.event not in ("start", "restart"):
        if last.code == 0:
            return "stopped", f"finished so far: {', '.join(progress.finished) or 'nothing'}"
        failed = last.event == "give up" or last.code not in (None, 75)
        return "failed" if failed else "interrupted", last.reason
    if queue is not None and _ids(progress, handed):
        over = _known(progress, handed, queue, live=False)
        return "stopped", f"job {over[-1].job} is {over[-1].state}" if over else "Slurm knows its job no more"
    silent = now - (progress.active or progress.begun)
    if silent > _BREATH and progress.finished and progress.step == progress.stages[progress.finished[-1]]:
        return "stopped", f"finished so far: {', '.join(progress.finished)}"
    return ("running", "") if silent < _SILENT else ("silent", "no step for ten minutes")


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
    sys.exit(main(sys.argv[1:]))
