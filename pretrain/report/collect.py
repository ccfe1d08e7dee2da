"""The files of a run directory as data. What is missing, torn or empty is left out, and said.

n points of a series.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from datasets.errors import UserError
from pretrain.rundir import RunDir
from pretrain.sinks.jsonl import read
from pretrain.starts import Start, read_starts

T = TypeVar("T")

_TEXT = 500
"""Characters of a caption or key that are shown; data may hold one of a megabyte."""
_SHEETS = 4
"""Sample sheets of a run that are shown: the first, the last, and evenly between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric of one run."""

    samples: np.ndarray  # (n,) float64, images seen
    values: np.ndarray  # (n,) float64, finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One evaluated value."""

    value: float
    chance: float | None
    """What guessing would get, where that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """RUN_DIR/evaluations/NAME.json."""

    name: str
    step: int
    data: str
    scores: dict[str, Score]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One image of a sample sheet."""

    key: str
    image: Path
    said: str
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """RUN_DIR/samples/step-NNNNNNNN.json, and the picture beside it."""

    step: int
    samples: int
    said_by: str
    picture: Path
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """Everything that the report says about a run."""

    root: Path
    name: str
    config: dict[str, Any]
    """run.yaml."""
    steps: int
    """Steps of the whole run."""
    series: dict[str, Series]
    """Of metrics.jsonl, by name; `step`, `time` and `finished` among them."""
    starts: tuple[Start, ...]
    sheets: tuple[Sheet, ...]
    evaluations: tuple[Evaluation, ...]
    problems: tuple[str, ...]
    """A sentence for each file that is there and cannot be read."""

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        return float(self.series[name].values[-1]) if name in self.series else None

    @property
    def samples(self) -> int:
        """Images seen."""
        return int(self.series["step"].samples[-1]) if "step" in self.series else 0

    @property
    def step(self) -> int:
        """The newest step that was reported."""
        return int(self.last("step") or 0)

    @property
    def finished(self) -> bool:
        """Whether it was trained to its last step and judged; more steps make a finished run unfinished."""
        end = self.series.get("finished")
        return end is not None and end.samples[-1] == self.samples and self.step >= self.steps


def collect(root: Path) -> RunData:
    """Read a run directory; a process may be training in it.

    Raises:
        UserError: it is not the directory of a run, or its two main files cannot be read.
    """
    rundir = RunDir(root)
    if not rundir.run_yaml.is_file():
        raise UserError(f"{root} is not the directory of a run: there is no run.yaml in it")
    problems: list[str] = []
    paths = sorted(rundir.samples.glob("step-*.json"))
    chosen = {round(place * (len(paths) - 1) / (_SHEETS - 1)) for place in range(_SHEETS)} if paths else set()
    config = _config(rundir.run_yaml)
    return RunData(
        root=root,
        name=root.resolve().name,
        config=config,
        steps=_steps(config, rundir.run_yaml),
        series=_series(rundir.metrics),
        starts=tuple(read_starts(rundir.starts)),
        sheets=tuple(_each([paths[place] for place in sorted(chosen)], _sheet, problems)),
        evaluations=tuple(_each(sorted(rundir.evaluations.glob("*.json")), _evaluation, problems)),
        problems=tuple(problems),
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return config


def _steps(config: Any, path: Path) -> int:
    try:
        return sum(int(stage["steps"]) for stage in config["stages"].values())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} was not written by a run: it has no stages with their steps") from error


def _series(path: Path) -> dict[str, Series]:
    """Every number of a metrics file by its name; null is no number."""
    points: dict[str, tuple[list[float], list[float]]] = {}
    try:
        for record in read(path) if path.exists() else ():
            samples = float(record.pop("samples"))
            for name, value in record.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    at, values = points.setdefault(name, ([], []))
                    at.append(samples)
                    values.append(value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a metrics file: {type(error).__name__}: {error}") from error
    return {
        name: Series(samples=np.array(at, float), values=np.array(values, float))
        for name, (at, values) in points.items()
    }


def _each(paths: Sequence[Path], parse: Callable[[Path], T], problems: list[str]) -> Iterator[T]:
    for path in paths:
        try:
            yield parse(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{path} cannot be read: {type(error).__name__}: {error}")


def _evaluation(path: Path) -> Evaluation:
    content = json.loads(path.read_text())
    return Evaluation(
        name=path.stem,
        step=int(content["step"]),
        data=_text(content["data"]),
        scores={
            name: Score(value=float(each["value"]), chance=_number(each.get("chance")))
            for name, each in content["values"].items()
            if each["value"] is not None
        },
    )


def _sheet(path: Path) -> Sheet:
    content = json.loads(path.read_text())
    return Sheet(
        step=int(content["step"]),
        samples=int(content["samples"]),
        said_by=_text(content["said_by"]),
        picture=path.with_suffix(".png"),
        rows=tuple(
            Row(
                key=_text(row["key"]),
                # Only the name counts: what a file says must not make the report show another folder.
                image=path.parent / "images" / Path(row["image"]).name,
                said=_text(row["said"]),
                references=tuple(_text(each) for each in row["references"]),
            )
            for row in content["rows"]
        ),
    )


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _TEXT else text[:_TEXT] + "..."


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
