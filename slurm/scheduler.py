"""Whether there is a Slurm, and what it says of jobs; nothing, where it knows them no more."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

_FORMAT = "%i|%A|%T|%r|%L|%S"
_PATIENCE = 20
"""Seconds that a controller has to answer."""


@dataclass(frozen=True, slots=True)
class Queued:
    """A job that is in the queue, or was a moment ago."""

    job: str
    """123, or 123_4 in an array."""
    state: str
    """PENDING, RUNNING, COMPLETED, ..."""
    reason: str
    """Why it waits; empty where it does not."""
    left: str
    """Time to its limit."""
    begins: str
    """When it is expected to begin; empty where that is not known."""

    @property
    def live(self) -> bool:
        """Whether it runs or will."""
        return self.state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")


def absent() -> str | None:
    """Why nothing can be submitted from this machine, in words; None where a cluster answers."""
    for name in ("sbatch", "srun", "sinfo"):
        if shutil.which(name) is None:
            return f"there is no Slurm on this machine (no {name})"
    try:  # its commands may be installed where no cluster is, or none that answers
        asked = subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=_PATIENCE)
        answers = asked.returncode == 0
    except subprocess.TimeoutExpired:
        answers = False
    return None if answers else "no Slurm answers on this machine (`sinfo` says why)"


def ask(ids: Iterable[str]) -> dict[str, Queued] | None:
    """What the queue holds of some jobs, in one question, by each id that is given; None if it is silent."""
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        return {}
    command = ["squeue", "--noheader", "--array", "--states=all", f"--format={_FORMAT}"]
    try:
        answer = subprocess.run(
            [*command, f"--jobs={','.join(wanted)}"], capture_output=True, text=True, timeout=_PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:  # known no more, which is an answer
        return None
    found: dict[str, Queued] = {}
    for line in answer.stdout.splitlines():
        fields = line.split("|")
        if len(fields) != 6:
            continue
        job, raw, state, reason, left, begins = fields
        reason = "" if reason == "None" or state != "PENDING" else reason
        queued = Queued(job, state, reason, left, "" if begins == "N/A" or state != "PENDING" else begins)
        for name in (job, raw):
            if name in wanted:
                found[name] = queued
    return found
