"""Weights of objectives and of sources: a number, or points on a line of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

from datasets.errors import UserError

Weight = float | tuple[tuple[int, float], ...]
"""A constant, or (step, value) points with straight lines between them."""


def weight_at(weight: Weight, step: int) -> float:
    """The weight that holds at a step: constant beyond the first and last point, linear between."""
    if isinstance(weight, int | float):
        return float(weight)
    before = weight[0]
    for point in weight:
        if step < point[0]:
            if step <= before[0]:
                return before[1]
            share = (step - before[0]) / (point[0] - before[0])
            return before[1] + share * (point[1] - before[1])
        before = point
    return before[1]


def turns(weight: Weight) -> set[int]:
    """The steps at which it turns: between two of them it is a straight line."""
    return set() if isinstance(weight, int | float) else {step for step, _ in weight}


def weights_in(chosen: Mapping[str, Weight], own: Mapping[str, Weight], *, begins: int) -> dict[str, Weight]:
    """The weights that hold in a stage of a run, by name, in the order of the run.

    Args:
        chosen: by the stage, whose points count its own steps; none for everything the run has.
        own: of the run, whose points count its steps.
        begins: the step of the run at which the stage begins.
    """
    if not chosen:
        return dict(own)
    return {name: _later(chosen[name], begins) for name in own if name in chosen}


def _later(weight: Weight, steps: int) -> Weight:
    """The same weight, of which every point comes so many steps later."""
    return weight if isinstance(weight, int | float) else tuple((at + steps, value) for at, value in weight)


def check_weight(weight: Weight, flag: str) -> None:
    """Refuse a weight that is no number, or points that are no line.

    Raises:
        UserError: names the flag.
    """
    points = ((0, weight),) if isinstance(weight, int | float) else weight
    steps = [step for step, _ in points]
    if not points or steps != sorted(set(steps)):
        raise UserError(f"{flag} needs STEP VALUE points with rising steps, not {weight}")
    if not all(0 <= value < math.inf for _, value in points):
        raise UserError(f"{flag} is {weight}; a weight is a number of at least 0")
