"""Where the time of a run went: training, beside the training, and what interruptions have cost."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pretrain.report.collect import RunData


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of a run from its first start to its newest record. The three parts add up to the total."""

    total: float
    training: float
    """Steps that count: images seen, at the speed that was reported with them."""
    interrupted: float
    """From the newest record before a restart to that restart: steps to be done again, and standing still."""
    other: float
    """Starting, evaluating, writing checkpoints."""
    gaps: tuple[float, ...]
    """The interruption before each start, (starts,); 0 before the first."""


def timing(run: RunData) -> Timing | None:
    """Add it up; None for a run without a report, and for one whose starts were not recorded."""
    if "time" not in run.series or not run.starts:
        return None
    times = run.series["time"].values
    gaps = [0.0]
    for previous, start in pairwise(run.starts):
        # Records of abandoned steps are gone by now, so the time that they took counts as interrupted.
        kept = times[times < start.time]
        since = max([previous.time, *kept[-1:]])
        gaps.append(max(0.0, start.time - since))
    total = max(float(times[-1]), run.starts[-1].time) - run.starts[0].time
    interrupted = min(sum(gaps), total)
    training = min(_training(run), total - interrupted)
    return Timing(
        total=total,
        training=training,
        interrupted=interrupted,
        other=total - interrupted - training,
        gaps=tuple(gaps),
    )


def _training(run: RunData) -> float:
    speed = run.series.get("perf/samples_per_second")
    if speed is None:
        return 0.0
    seen = np.diff(speed.samples, prepend=0.0)
    moving = speed.values > 0
    return float((seen[moving] / speed.values[moving]).sum())
