"""CPU time of a program and everything it starts, read at the moment it begins to write a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.errors import UserError

_POLL = 0.02  # seconds; the watcher's own CPU time is not counted


@dataclass(frozen=True, kw_only=True)
class Training:
    """A command and what it leaves behind."""

    command: Sequence[str]
    checkpoints: Path
    """The folder that its checkpoints appear in."""
    names: Mapping[int, str]
    """Step to a pattern for the first name that the checkpoint of that step has there."""
    weights: Mapping[int, Path]
    """Step to a safetensors file, there when the program has ended."""


def watch(training: Training, *, environment: Mapping[str, str], log: Path) -> dict[int, float]:
    """Run it; of each step that is saved, the CPU seconds spent so far, user and system.

    Raises:
        UserError: it failed, or a checkpoint was never seen.
    """
    waiting, seen = dict(training.names), {}
    with log.open("wb") as out:
        process = subprocess.Popen(
            training.command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,  # by which its descendants are known
        )
    try:
        while process.poll() is None:
            for step in [s for s, name in waiting.items() if any(training.checkpoints.glob(name))]:
                seen[step] = cpu_seconds(process.pid)
                del waiting[step]
            time.sleep(_POLL)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode or waiting:
        raise UserError(f"a training ended early (exit code {process.returncode}): see {log}")
    return seen


def cpu_seconds(session: int) -> float:
    """User and system time of all processes of a session, with that of their children that have ended."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime of proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")
