"""RUN_DIR/attempts.jsonl: what the supervisor did, one line for each start, end and consequence.

{"time": 1.8e9, "event": "start", "attempt": "4711.0.1", "job": "4711", "restart": 0, "step": 0}
{"time": 1.8e9, "event": "end", "attempt": "4711.0.1", ..., "step": 120, "code": 75, "reason": "SIGUSR2 ..."}
{"time": 1.8e9, "event": "requeue", "attempt": "4711.0.1", ..., "step": 120, "reason": "..."}
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["start", "end", "restart", "requeue", "leave", "give up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that the supervisor did or saw."""

    event: Kind
    attempt: str
    """JOB.RESTART.NUMBER of the start that it belongs to."""
    job: str = ""
    """The Slurm job, if there is one."""
    restart: int = 0
    """How often Slurm had requeued it."""
    step: int = 0
    """The newest step with a checkpoint."""
    code: int | None = None
    """The exit code, of an end."""
    reason: str = ""
    """In words."""
    time: float = 0.0
    """Unix seconds."""


def note(out: Path, event: Event) -> None:
    """Append it to the attempts of a run."""
    out.mkdir(parents=True, exist_ok=True)
    line = {**asdict(event), "time": round(time.time(), 3)}
    with (out / "attempts.jsonl").open("ab") as file:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_attempts(out: Path) -> Iterator[Event]:
    """What happened so far, in order; what is no event, such as a torn line, is left out."""
    path = out / "attempts.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            yield Event(**json.loads(line))
        except (ValueError, TypeError):
            continue
