"""What was measured, and how it is shown and kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets.errors import UserError
from pretrain.fencing import replace

AVERAGED = "the weights are the moving average of those that were trained"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measured value."""

    value: float
    chance: float | None = None
    """What guessing would get, where that is known."""


Results = dict[str, Result]


def table(results: Mapping[str, Result]) -> Sequence[str]:
    """One line per value, aligned."""
    width = max(map(len, results), default=0)
    return [
        f"  {name:<{width}}  {result.value:8.3f}"
        + (f"   (chance {result.chance:.3f})" if result.chance is not None else "")
        for name, result in results.items()
    ]


def save(
    path: Path,
    results: Mapping[str, Result],
    *,
    step: int,
    data: str,
    limit: int,
    classes: str,
    resolution: int,
    averaged: bool = False,
) -> None:
    """Write results as JSON: the arguments by name, and `"values": {NAME: {"value": ..., "chance": ...}}`.

    Args:
        path: the file; it and its directory are created.
        results: what was measured.
        step: of the model.
        data: on what.
        limit: samples that were looked at, 0 for all.
        classes: the class file, if one was named.
        resolution: of the images, in pixels.
        averaged: whether the weights were the moving average of those that were trained.

    Raises:
        UserError: the file cannot be written.
    """
    plain = {
        "step": step,
        "data": data,
        "limit": limit,
        "classes": classes,
        "resolution": resolution,
        "averaged": averaged,
        "values": {name: asdict(each) for name, each in results.items()},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps(plain, indent=1).encode())
    except OSError as error:
        raise UserError(f"the results cannot be written to {path}: {error.strerror}") from error
