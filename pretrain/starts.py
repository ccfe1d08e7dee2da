"""RUN_DIR/starts.jsonl: one line per start, so that a report can tell what interruptions have cost."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pretrain.fencing import Records


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a run."""

    time: float
    """Unix seconds."""
    step: int
    """The step it began from."""
    stage: str
    """The stage that it trains."""
    lost: int
    """Steps that had been done beyond it, and are done again."""
    ranks: int
    device: str
    changed: tuple[str, ...] = ()
    """What was allowed to be other than before (--allow-changed), in words."""
    alone: bool = False
    """Whether it ends with its stage, whatever stages follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Starts:
    """What all starts of a run come to."""

    restarts: int
    """Starts of a stage after its first."""
    lost_steps: int
    """Steps that were done twice, over all of them."""


def record_start(
    path: Path,
    *,
    step: int,
    stage: str,
    done: int,
    ranks: int,
    device: str,
    changed: Sequence[str] = (),
    alone: bool = False,
) -> Starts:
    """Append this start and sum up all of them.

    Args:
        path: RUN_DIR/starts.jsonl.
        step: the step this start begins from.
        stage: the stage that it trains.
        done: the last step that was ever done.
        ranks: processes that train together.
        device: the kind of device they train on.
        changed: what was allowed to be other than before, in words.
        alone: whether it ends with its stage.
    """
    start = Start(
        time=round(time.time(), 3),
        step=step,
        stage=stage,
        lost=max(0, done - step),
        ranks=ranks,
        device=device,
        changed=tuple(changed),
        alone=alone,
    )
    with Records(path) as file:
        file.seek(0)
        # A line torn by a crash is closed first, so that it costs no more than itself.
        torn = not file.read().endswith(b"\n") and file.tell() > 0
        file.write(b"\n" * torn + json.dumps(asdict(start)).encode() + b"\n")
    return sum_up(list(read_starts(path)))


def sum_up(starts: Sequence[Start]) -> Starts:
    """What interruptions have cost."""
    restarts = len(starts) - len({each.stage for each in starts})
    return Starts(restarts=restarts, lost_steps=sum(each.lost for each in starts))


def read_starts(path: Path) -> Iterator[Start]:
    """The starts of a run, in order; what is no start, such as a torn line, is left out."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            start = Start(**json.loads(line))
            yield replace(start, changed=tuple(start.changed))
        except (ValueError, TypeError):
            continue
