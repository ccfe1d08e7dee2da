"""RUN_DIR/plots/*.png, drawn from metrics.jsonl: losses, throughput, and everything else reported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain.fencing import check
from pretrain.sinks.jsonl import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Name to samples seen and values, both (n,) float64."""

_SPEED = {
    "perf/samples_per_second": "samples per second",
    "perf/data_wait": "share of time waiting for data",
}
_NOT_DRAWN = {"step", "samples", "time", "perf/seconds_left", *_SPEED}
_LOSS = "train/loss/"
_RAW, _SMOOTH, _INK = "#9db8d9", "#1f5fa8", "#333333"
_SMOOTHED_FROM = 40
"""Points from which a series is drawn faint, under its moving average."""


def draw(metrics: Path, folder: Path) -> list[Path]:
    """Draw what a metrics file holds, against samples seen.

    Args:
        metrics: RUN_DIR/metrics.jsonl.
        folder: RUN_DIR/plots; created.

    Returns:
        `losses.png` with a panel per objective, `throughput.png`, `metrics.png`; those that have a series.
    """
    series = _series(metrics)
    losses = {name: series[name] for name in series if name.startswith(_LOSS)}
    if "train/loss" in series and len(losses) > 1:
        losses = {"train/loss": series["train/loss"], **losses}
    figures: dict[str, Series] = {
        "losses": {_loss_title(name): points for name, points in losses.items()},
        "throughput": {title: series[name] for name, title in _SPEED.items() if name in series},
        "metrics": {
            name: points
            for name, points in series.items()
            if name not in _NOT_DRAWN
            and name != "train/loss"
            and not name.startswith(_LOSS)
            and len(points[0]) > 1
        },
    }
    check(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [_figure(folder / f"{name}.png", panels) for name, panels in figures.items() if panels]


def _loss_title(name: str) -> str:
    return "sum of all objectives, weighted" if name == "train/loss" else f"{name.removeprefix(_LOSS)} loss"


def _series(metrics: Path) -> Series:
    points: dict[str, list[tuple[float, float]]] = {}
    for record in read(metrics):
        for name, value in record.items():
            if value is not None:
                points.setdefault(name, []).append((record["samples"], value))
    return {name: (array[:, 0], array[:, 1]) for name in points for array in [np.array(points[name], float)]}


def _figure(path: Path, panels: Series) -> Path:
    # Imported here: it costs half a second, and no global state (pyplot, a backend) is touched.
    from matplotlib.figure import Figure

    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), dpi=120, layout="constrained")
    end = max(1.0, *(samples[-1] for samples, _ in panels.values()))
    for place, (title, (samples, values)) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        _panel(axes, title, samples, values)
        axes.set_xlim(0, end)
        if title in _SPEED.values():
            axes.set_ylim(bottom=0)
    figure.savefig(path)
    return path


def _panel(axes: Axes, title: str, samples: np.ndarray, values: np.ndarray) -> None:
    from matplotlib.ticker import EngFormatter

    if len(values) < _SMOOTHED_FROM:
        axes.plot(samples, values, color=_SMOOTH, linewidth=1.6, marker="o", markersize=3.5, clip_on=False)
    elif title == "train/lr":  # a schedule has corners, and no noise
        axes.plot(samples, values, color=_SMOOTH, linewidth=1.6)
    else:
        axes.plot(samples, values, color=_RAW, linewidth=0.8)
        axes.plot(samples, smooth(values), color=_SMOOTH, linewidth=1.8)
    axes.set_title(title, fontsize=11, color=_INK, loc="left")
    axes.set_xlabel("samples seen", fontsize=9, color=_INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors=_INK, labelsize=8, color="#bbbbbb")


def smooth(values: np.ndarray) -> np.ndarray:
    """(n,) moving average over a twentieth of the series: centred, narrower at the steep start."""
    half = max(len(values) // 40, 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(place, half)
    first, last = place - reach, np.minimum(place + reach, len(values) - 1)
    return (total[last + 1] - total[first]) / (last + 1 - first)
