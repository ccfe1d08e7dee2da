"""The stages of a run on one line of steps: as a table, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pretrain.build import trained_in
from pretrain.config import Run
from pretrain.curriculum import Curriculum, Stretch
from pretrain.pretrainer import Pretrainer
from pretrain.tables import millions, share, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#dbe7f5", "#f6e6d2", "#dff0e0", "#eee0f2", "#f5dede")
_LINE, _OTHER = "#1f5fa8", "#b3541e"
_POINTS = 400  # at which a learning rate is drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A stretch, and what is seen and trained in it."""

    stretch: Stretch
    objectives: Sequence[str]
    sources: Sequence[str]
    image_tokens: int
    """Of an image at this resolution."""
    text_tokens: float
    """Of the texts of a sample."""
    trained: int
    """Parameters that train."""
    parameters: int

    @property
    def samples(self) -> int:
        """Of all its steps together."""
        return (self.stretch.last - self.stretch.first) * self.stretch.batch

    @property
    def tokens(self) -> float:
        """Of a step: patches of images and tokens of texts."""
        return self.stretch.batch * (self.image_tokens + self.text_tokens)


def rows_of(
    run: Run,
    curriculum: Curriculum,
    pretrainer: Pretrainer,
    feeds: Mapping[str, Mapping[str, Sequence[str]]],
    *,
    text_tokens: float,
) -> list[Row]:
    """A row for each stretch.

    Args:
        run: the run.
        curriculum: its stages.
        pretrainer: with all objectives of the run; what of it trains is left as it was.
        feeds: of each stage and source, the objectives that see its batches.
        text_tokens: of the texts of a sample, on average.
    """
    trained = trained_in(pretrainer, run, feeds)
    sides = {each.resolution for each in curriculum.stretches}
    patches = {side: _image_tokens(pretrainer, side) for side in sides}
    return [
        Row(
            stretch=each,
            objectives=list(each.stage.objectives or run.objectives),
            sources=list(each.stage.sources or run.sources),
            image_tokens=patches[each.resolution],
            text_tokens=text_tokens,
            trained=trained[each.name],
            parameters=sum(each.numel() for each in pretrainer.parameters()),
        )
        for each in curriculum.stretches
    ]


@torch.no_grad()
def _image_tokens(pretrainer: Pretrainer, side: int) -> int:
    device = pretrainer.model.logit_scale.device
    black = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
    return pretrainer.model.encode_image(black)["image_tokens"].shape[1]


def described(rows: Sequence[Row]) -> list[str]:
    """The rows as a table; tokens of a sample are those of its image and of its texts."""
    heads = (
        *("stage", "steps", "samples", "objectives", "sources", "pixels", "tokens", "batch", "micro-batches"),
        *("tokens a step", "trained", "optimizer", "moments"),
    )
    cells: list[list[str]] = []
    for row in rows:
        stretch, optim = row.stretch, row.stretch.stage.optim
        first = stretch.first == 0
        kept = "" if first else "kept" if stretch.first > stretch.begins else stretch.stage.moments
        cells.append(
            [
                stretch.name,
                f"{stretch.first:,}..{stretch.last:,}",
                f"{row.samples:,}",
                ", ".join(row.objectives),
                ", ".join(row.sources),
                str(stretch.resolution),
                f"{row.image_tokens:,} + {row.text_tokens:.1f}",
                f"{stretch.batch:,}",
                str(stretch.micro_batches),
                f"{row.tokens:,.0f}",
                f"{millions(row.trained)} ({share(row.trained, row.parameters)})",
                f"{optim.kind} {optim.lr:g} {optim.schedule}",
                kept,
            ]
        )
    return table(heads, cells)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows against the steps of the run as a PNG: sizes, tokens of a step, learning rate.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    sides, batches, rates = figure.subplots(3, sharex=True, height_ratios=(1.4, 1, 1))
    for axes in (sides, batches, rates):
        _shade(axes, rows)
    _label(sides, rows)
    _staircase(sides, rows, [row.stretch.resolution for row in rows], "pixels", _LINE)
    _staircase(batches, rows, [row.stretch.batch for row in rows], "samples a step", _LINE)
    _staircase(batches.twinx(), rows, [row.tokens for row in rows], "tokens a step", _OTHER)
    for stretch in {row.stretch.name: row.stretch for row in rows}.values():
        steps, optim = stretch.stage.steps, stretch.stage.optim
        places = [place * max(steps - 1, 0) // _POINTS for place in range(_POINTS + 1)]
        rates.plot(
            [stretch.begins + place for place in places],
            [optim.lr_at(place, steps) for place in places],
            color=_LINE,
        )
    rates.set_yscale("log")
    peaks = [row.stretch.stage.optim.lr for row in rows]
    rates.set_ylim(min(peaks) / 1e2, 2 * max(peaks))  # a cosine ends at nothing
    rates.set_ylabel("learning rate", color=_LINE)
    rates.set_xlabel("optimizer steps")
    rates.set_xlim(0, rows[-1].stretch.last)
    rates.xaxis.set_major_formatter("{x:,.0f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _shade(axes: Axes, rows: Sequence[Row]) -> None:
    """A colour for each stage, and a line where a size changes inside one."""
    names = list(dict.fromkeys(row.stretch.name for row in rows))
    for row in rows:
        colour = _COLOURS[names.index(row.stretch.name) % len(_COLOURS)]
        axes.axvspan(row.stretch.first, row.stretch.last, color=colour, linewidth=0)
        if row.stretch.first > row.stretch.begins:
            axes.axvline(row.stretch.first, color="white", linewidth=2)
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Axes, rows: Sequence[Row]) -> None:
    """Above each stage, what is trained on what."""
    for name in dict.fromkeys(row.stretch.name for row in rows):
        here = [row for row in rows if row.stretch.name == name]
        samples = sum(row.samples for row in here)
        middle = (here[0].stretch.begins + here[0].stretch.ends) / 2
        words = (
            f"{name}: {', '.join(here[0].objectives)} on {', '.join(here[0].sources)}\n"
            f"{here[0].stretch.stage.steps:,} steps, {_short(samples)} samples\n"
            f"{millions(here[0].trained)} of {millions(here[0].parameters)} parameters"
        )
        place = axes.get_xaxis_transform()
        axes.text(middle, 1.04, words, transform=place, ha="center", va="bottom", fontsize=9)


def _staircase(axes: Axes, rows: Sequence[Row], values: Sequence[float], title: str, colour: str) -> None:
    edges = [*(row.stretch.first for row in rows), rows[-1].stretch.last]
    style = "--" if colour == _OTHER else "-"
    axes.stairs(values, edges, baseline=None, color=colour, linewidth=2, linestyle=style)
    axes.set_ylim(0, 1.25 * max(values))
    axes.set_ylabel(title, color=colour)
    if len(set(values)) <= 6:
        axes.set_yticks(sorted(set(values)), [_short(value) for value in sorted(set(values))])


def _short(value: float) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= unit:
            return f"{value / (1e3 if unit == 1e4 else unit):.3g}{name}"
    return f"{value:,.0f}"
