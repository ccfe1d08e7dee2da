"""The status of runs for people: lines for one, a table for several."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slurm.status import Status

_COLUMNS = ("run", "state", "stage", "step", "samples/s", "left", "restarts", "lost", "saved", "last error")
_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


def show(found: Sequence[Status]) -> None:
    """Print what is known."""
    if len(found) == 1:
        sys.stdout.writelines(f"{name:10}{text}\n" for name, text in lines(found[0]).items() if text)
        return
    rows = [_COLUMNS, *(row(each) for each in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        sys.stdout.write("  ".join(padded).rstrip() + "\n")


def lines(status: Status) -> dict[str, str]:
    """One run, a line for each thing."""
    return {
        "run": status.run,
        "state": f"{status.state}{f' ({status.why})' if status.why else ''}",
        "jobs": ", ".join(status.jobs),
        "stage": f"{status.stage}, step {status.step} of {status.steps}" if status.steps else "",
        "speed": _speed(status),
        "last step": f"{span(status.silent_for)} ago" if status.silent_for is not None else "",
        "saved": _saved(status),
        "restarts": f"{status.restarts}, {status.lost_steps} steps lost",
        "error": f"{status.error}, {span(status.error_age)} ago" if status.error else "",
        "log": status.log,
    }


def row(status: Status) -> tuple[str, ...]:
    """One run of several, a cell for each column."""
    return (
        status.run,
        f"{status.state} ({status.why})" if status.state in ("waiting", "silent") else status.state,
        status.stage or "-",
        f"{status.step} of {status.steps}" if status.steps else "-",
        _rate(status),
        f"{span(status.seconds_left)}{_of_stage(status)}",
        str(status.restarts),
        str(status.lost_steps),
        _saved(status),
        status.error or "-",
    )


def span(seconds: float | None) -> str:
    """A length of time in its two largest units."""
    if seconds is None:
        return "-"
    whole = max(0, round(seconds))
    for size, unit, smaller, least in _UNITS:
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {least}"
    return f"{whole} s"


def _speed(status: Status) -> str:
    if status.samples_per_second is None or status.state == "finished":
        return ""
    left = "" if status.seconds_left is None else f", {span(status.seconds_left)} left{_of_stage(status)}"
    return f"{_rate(status)} samples/s{left}"


def _of_stage(status: Status) -> str:
    """What the time left is of, where it is not the whole run."""
    return f" of stage {status.until}" if status.until and status.seconds_left is not None else ""


def _rate(status: Status) -> str:
    return "-" if status.samples_per_second is None else f"{status.samples_per_second:,.0f}"


def _saved(status: Status) -> str:
    if status.checkpoint is None:
        return "nothing"
    return f"step {status.checkpoint}, {span(status.checkpoint_age)} ago"
