"""RUN_DIR/jobs.jsonl: one line per job that was submitted for a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A job that was handed over."""

    time: float
    """Unix seconds."""
    host: str
    """Where it was submitted."""
    executor: str
    """slurm, local or debug."""
    job: str
    """What the executor calls it: 123, 123_4 in an array, or the id of a process."""
    log: str
    """What it prints."""
    stage: str
    """The only stage that it trains; empty for all."""
    nodes: int
    tasks: int
    """Processes of each node."""
    code: str
    """The copy of the code that it runs."""
    commit: str
    command: list[str]
    """Arguments of `pretrain.launch`."""


def record(out: Path, job: Submitted) -> None:
    """Append a job to those of a run."""
    with (out / "jobs.jsonl").open("a") as file:
        file.write(json.dumps(asdict(job)) + "\n")


def read(out: Path) -> Iterator[Submitted]:
    """The jobs of a run, in order; a line that is no job is left out."""
    path = out / "jobs.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield Submitted(**json.loads(line))
        except (ValueError, TypeError):
            continue
