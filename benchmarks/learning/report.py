"""What came of it: tables of recall against CPU time, and a plot.

S seeds, M marks (checkpoints, and the initial weights first).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "open_clip": "open_clip_train",
    "same_budget": "Medley, same CPU time",
    "same_steps": "Medley, same steps",
    "muon": "Medley with Muon, same CPU time",
}
COLUMNS = {
    "image_to_text_recall@1": "image to text R@1",
    "image_to_text_recall@10": "R@10",
    "text_to_image_recall@1": "text to image R@1",
    "text_to_image_recall@10": "R@10",
}
_FRACTIONS = (0.25, 0.5, 0.75, 1.0)
_COLOURS = {"open_clip": "#c0504d", "same_budget": "#1f5fa8", "same_steps": "#7fb2e5", "muon": "#6b9e3f"}


@dataclass(frozen=True, kw_only=True)
class Curves:
    """All runs of one system on one data set."""

    steps: np.ndarray
    """(M,)"""
    cpu: np.ndarray
    """(S, M) seconds."""
    recall: Mapping[str, np.ndarray]
    """(S, M) by name."""

    def at(self, seconds: float, name: str) -> np.ndarray:
        """(S,) between two marks in proportion; nan after a run's end."""
        rows = zip(self.cpu, self.recall[name], strict=True)
        return np.array([np.interp(seconds, cpu, values, right=np.nan) for cpu, values in rows])


def curves(runs: Sequence[Sequence[Mapping[str, float]]]) -> Curves:
    """From the marks of each seed's run: `step`, `cpu_seconds` and recall by name."""
    names = [name for name in runs[0][0] if "recall@" in name]
    return Curves(
        steps=np.array([mark["step"] for mark in runs[0]]),
        cpu=np.array([[mark["cpu_seconds"] for mark in run] for run in runs]),
        recall={name: np.array([[mark[name] for mark in run] for run in runs]) for name in names},
    )


def tables(found: Mapping[str, Curves], *, batch: int) -> list[str]:
    """Lines of Markdown: recall at the same time, at the same step, and what follows from both."""
    peer, budget, steps = (found[system] for system in ("open_clip", "same_budget", "same_steps"))
    end = float(min(each.cpu[:, -1].min() for system, each in found.items() if system != "same_steps"))
    heads = " | ".join(COLUMNS.values())
    lines = [f"| CPU time | | {heads} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for fraction in _FRACTIONS:
        for system in (system for system in found if system != "same_steps"):
            cells = [_spread(found[system].at(fraction * end, name)) for name in COLUMNS]
            lines.append(f"| {fraction * end:.0f} s | {LABELS[system]} | {' | '.join(cells)} |")
    lines += ["", f"| step | CPU time | | {heads} |", "|---" * (len(COLUMNS) + 3) + "|"]
    for fraction in _FRACTIONS:
        mark = round(fraction * (len(peer.steps) - 1))
        for system, each in (("open_clip", peer), ("same_steps", steps)):
            cells = [_spread(each.recall[name][:, mark]) for name in COLUMNS]
            seconds = each.cpu[:, mark].mean()
            row = " | ".join(cells)
            lines.append(f"| {each.steps[mark]} | {seconds:.0f} s | {LABELS[system]} | {row} |")
    return [*lines, "", *_speeds(found, batch=batch), *_verdict(peer, budget)]


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ({values.min():.3f}-{values.max():.3f})"


def _speeds(found: Mapping[str, Curves], *, batch: int) -> list[str]:
    """Samples per CPU second between the first and the last checkpoint, and what came before the first."""
    lines = []
    for system, each in found.items():
        pace = (each.cpu[:, -1] - each.cpu[:, 1]) / (each.steps[-1] - each.steps[1])
        begun = each.cpu[:, 1] - pace * each.steps[1]
        speed = _spread_of(batch / pace)
        lines.append(
            f"{LABELS[system]}: {speed} samples per CPU second, {begun.mean():.0f} s to start, "
            f"{each.steps[-1]} steps, {each.steps[-1] * batch} samples"
        )
    return lines


def _spread_of(values: np.ndarray) -> str:
    return f"{values.mean():.0f} ({values.min():.0f}-{values.max():.0f})"


def _verdict(peer: Curves, budget: Curves) -> list[str]:
    """At which of the peer's checkpoints Medley's mean is higher, and when it reaches the peer's last one."""
    lines = []
    seconds, end = peer.cpu.mean(0)[1:], budget.cpu[:, -1].min()
    for name in COLUMNS:
        theirs = peer.recall[name].mean(0)[1:]
        ours = np.array([budget.at(min(at, end), name).mean() for at in seconds])
        behind = [
            f"{at:.0f} s ({mine:.3f} against {other:.3f})"
            for at, mine, other in zip(seconds, ours, theirs, strict=True)
            if mine <= other
        ]
        where = f", not at {', '.join(behind)}" if behind else ""
        reached = _reached(budget, name, theirs[-1])
        when = f"after {reached:.0f} s" if reached is not None else "not"
        lines.append(
            f"{name}: Medley is ahead at {len(seconds) - len(behind)} of {len(seconds)} times{where}; "
            f"what open_clip_train has after {seconds[-1]:.0f} s it reaches {when}"
        )
    return lines


def _reached(each: Curves, name: str, value: float) -> float | None:
    """Seconds at which the mean first has a value."""
    seconds, values = each.cpu.mean(0), each.recall[name].mean(0)
    if values.max() < value:
        return None
    last = max(1, int((values >= value).argmax()))
    return float(np.interp(value, values[last - 1 : last + 1], seconds[last - 1 : last + 1]))


def plot(found: Mapping[str, Mapping[str, Curves]], path: Path) -> None:
    """Two panels for each data set: recall against CPU time, mean of the seeds and the band they span."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6 * len(found)), dpi=120, layout="constrained")
    place = 0
    for data, systems in found.items():
        for direction in ("image_to_text", "text_to_image"):
            place += 1
            axes = figure.add_subplot(len(found), 2, place)
            for system, each in systems.items():
                _draw(axes, each, direction, colour=_COLOURS[system], label=LABELS[system])
            _dress(axes, f"{data}: {direction.replace('_', ' ')}")
            if place == 1:
                axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def _draw(axes: Axes, each: Curves, direction: str, *, colour: str, label: str) -> None:
    seconds = each.cpu.mean(0)
    for k, style in ((10, "-"), (1, "--")):
        values = each.recall[f"{direction}_recall@{k}"]
        named = label if k == 10 else None
        axes.plot(seconds, values.mean(0), style, color=colour, linewidth=1.8, label=named)
        axes.fill_between(seconds, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(f"{title}, R@10 (R@1 dashed)", fontsize=11, loc="left")
    axes.set_xlabel("CPU seconds", fontsize=9)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
