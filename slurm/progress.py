"""How far a run has come, from the files of its directory alone: they are the truth, whoever trains."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from datasets.errors import UserError
from pretrain.attempts import Event, read_attempts
from pretrain.rundir import RunDir
from pretrain.starts import Start, Starts, read_starts, sum_up

_CHECKPOINT = re.compile(r"step-(\d{8,})")
_LAST = 8
"""Reports at the end of a file that are looked at; one of them tells how fast it goes."""
_TAIL = 1 << 14
"""Bytes at the end of a file in which its last lines stand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands."""

    stages: Mapping[str, int]
    """The global step at which each stage ends, in order."""
    finished: tuple[str, ...]
    """Stages that were trained to their end and judged."""
    step: int
    """Steps done."""
    samples_per_second: float | None
    seconds_left: float | None
    """Training time to the end of what its last start trains, as of the last report."""
    active: float | None
    """When it last did a step, in Unix seconds."""
    checkpoint: int | None
    """Step of the newest checkpoint."""
    saved: float | None
    """When that was, in Unix seconds."""
    starts: tuple[Start, ...]
    events: tuple[Event, ...]
    """What the supervisor did."""

    @property
    def begun(self) -> float:
        """When it was last started, in Unix seconds; 0 for never."""
        return self.starts[-1].time if self.starts else 0.0

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return max(self.stages.values(), default=0)

    @property
    def stage(self) -> str:
        """The one that it is in; the last one when all are finished."""
        ahead = [name for name in self.stages if name not in self.finished]
        return next(iter(ahead or list(self.stages)[-1:]), "")

    @property
    def until(self) -> str:
        """The stage with which its last start ends; empty where that is the end of the run."""
        last = self.starts[-1] if self.starts else None
        return last.stage if last and last.alone and [last.stage] != list(self.stages)[-1:] else ""

    @property
    def done(self) -> bool:
        """Whether every stage is finished."""
        return bool(self.stages) and len(self.finished) == len(self.stages)

    @property
    def cost(self) -> Starts:
        """What interruptions have cost."""
        return sum_up(self.starts)

    @property
    def error(self) -> Event | None:
        """The last start that ended in any other way than done or saved."""
        ends = (each for each in self.events if each.event in ("end", "leave", "give up"))
        return next((each for each in reversed(list(ends)) if each.code not in (None, 0, 75)), None)


def read_progress(root: Path) -> Progress:
    """Read the directory of a run, also while it trains.

    Raises:
        UserError: it is not one.
    """
    rundir = RunDir(root)
    stages = _stages(rundir.run_yaml)
    starts = tuple(read_starts(rundir.starts))
    records = _records(rundir.metrics)
    last = records[-1] if records else {}
    pace = next((each for each in reversed(records) if each.get("perf/samples_per_second")), {})
    judged = {each["step"] for each in records if "finished" in each}
    begun = starts[-1].time if starts else 0.0
    step = max(last.get("step", 0), starts[-1].step if starts else 0)
    ledger, written = _ledger(rundir.ledger)
    if written > max(last.get("time", 0.0), begun):
        step = max(step, ledger)  # a step that was done since the last report
    checkpoint, saved = _newest(rundir.checkpoints)
    return Progress(
        stages=stages,
        finished=tuple(name for name, end in stages.items() if end in judged),
        step=step,
        samples_per_second=pace.get("perf/samples_per_second"),
        seconds_left=pace.get("perf/seconds_left"),
        active=max(written, last.get("time", 0.0)) or None,
        checkpoint=checkpoint,
        saved=saved,
        starts=starts,
        events=tuple(read_attempts(root)),
    )


def _stages(run_yaml: Path) -> dict[str, int]:
    """Where each stage ends; none, before a run has begun."""
    if not run_yaml.exists():
        return {}
    try:
        stages = yaml.safe_load(run_yaml.read_text())["stages"]
        steps = [int(stage["steps"]) for stage in stages.values()]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{run_yaml} cannot be read as a run: name the directory of one") from error
    return dict(zip(stages, accumulate(steps), strict=True))


def _records(metrics: Path) -> list[dict[str, Any]]:
    """The reports that say a stage is finished, and the last ones; a file of a long run has thousands."""
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    ends = [line for line in whole[:-_LAST] if b'"finished"' in line]
    return [json.loads(line) for line in [*ends, *whole[-_LAST:]]]


def _ledger(path: Path) -> tuple[int, float]:
    """The last step that was ever done, and when; zeros for none."""
    if not path.exists() or not path.stat().st_size:
        return 0, 0.0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        whole = [line for line in file.read().split(b"\n")[:-1] if line]
    return int(whole[-1].split()[0]) if whole else 0, path.stat().st_mtime


def _newest(checkpoints: Path) -> tuple[int | None, float | None]:
    """The newest step that has a checkpoint, and when it was saved."""
    folders = checkpoints.iterdir() if checkpoints.exists() else ()
    names = {int(match[1]): match[0] for path in folders if (match := _CHECKPOINT.fullmatch(path.name))}
    if not names:
        return None, None
    manifest = checkpoints / names[max(names)] / "manifest.json"
    return max(names), manifest.stat().st_mtime if manifest.exists() else None
