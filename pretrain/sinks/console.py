"""A progress bar where a person watches, one plain line per report where the output is a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from pretrain.sinks import Sink


def console(stream: TextIO, *, total: int, done: int = 0) -> Sink:
    """The sink that suits a stream.

    Args:
        stream: usually standard output.
        total: steps of the whole run.
        done: steps done before this start.
    """
    return Bar(stream, total=total, done=done) if stream.isatty() else Lines(stream, total=total)


class Lines:
    """One line per report, for logs."""

    def __init__(self, stream: TextIO, *, total: int) -> None:
        self._stream = stream
        self._total = total

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line; a report without a loss (an evaluation) is not about speed."""
        if "train/loss" not in values:
            return
        self.note(f"step {step}/{self._total}  {_losses(values)}  {_speed(values)}{_parts(values)}")

    def note(self, text: str) -> None:
        """Write a sentence."""
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing is held."""


class Bar:
    """A progress bar that moves with each report; sentences appear above it."""

    def __init__(self, stream: TextIO, *, total: int, done: int = 0) -> None:
        self._console = Console(file=stream, highlight=False, markup=False, soft_wrap=True)
        # No refresh thread: it would take turns with the training for nothing new to show.
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[speed]}", table_column=Column(no_wrap=True), style="dim"),
            # What is left of the width, so that many objectives are cut short and never wrap.
            TextColumn("{task.fields[losses]}", table_column=Column(no_wrap=True, ratio=1)),
            console=self._console,
            auto_refresh=False,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total, completed=done, speed="", losses="")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Move the bar; a report without a loss (an evaluation) is not about speed."""
        if "train/loss" not in values:
            return
        self._progress.update(self._task, completed=step, speed=_speed(values), losses=_losses(values))
        self._progress.start()  # the first time only: nothing is drawn before there is something to say
        self._progress.refresh()

    def note(self, text: str) -> None:
        """Write a sentence."""
        self._console.print(text)

    def close(self) -> None:
        """Leave the bar as it stands and give the cursor back."""
        self._progress.stop()


def _losses(values: Mapping[str, float]) -> str:
    terms = {name: value for name, value in values.items() if name.startswith("train/loss/")}
    return "  ".join(f"{name.removeprefix('train/loss/')} {value:.4f}" for name, value in terms.items())


def _speed(values: Mapping[str, float]) -> str:
    if "perf/samples_per_second" not in values:
        return ""
    left = values["perf/seconds_left"]
    shown = str(timedelta(seconds=round(left))) if math.isfinite(left) else "?"
    speed, wait = values["perf/samples_per_second"], values["perf/data_wait"]
    used = f"mfu {values['perf/mfu']:.0%}  " if "perf/mfu" in values else ""
    return f"{speed:.0f}/s  {used}wait {wait:.0%}  left {shown}"


def _parts(values: Mapping[str, float]) -> str:
    """`  (forward 31% backward 60% optimizer 4%)`: what the time of a step goes into, but for trifles."""
    prefix = "perf/part/"
    shares = {name.removeprefix(prefix): v for name, v in values.items() if name.startswith(prefix)}
    told = [f"{part} {share:.0%}" for part, share in shares.items() if share >= 0.01]
    return f"  ({' '.join(told)})" if told else ""
