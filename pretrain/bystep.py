"""Whole numbers that hold from a step of a stage on: a side of images, a batch."""

from __future__ import annotations

from datasets.errors import UserError

ByStep = int | tuple[tuple[int, int], ...]
"""A constant, or (step, value) from that step of the stage on: ((0, 224), (30_000, 490))."""


def points_of(value: ByStep) -> tuple[tuple[int, int], ...]:
    """The steps at which it changes, each with what holds from there."""
    return ((0, value),) if isinstance(value, int) else value


def held_at(value: ByStep, step: int) -> int:
    """What holds at a step >= 0 of the stage."""
    return next(held for first, held in reversed(points_of(value)) if step >= first)


def values_of(value: ByStep) -> tuple[int, ...]:
    """Everything that it ever is, in order."""
    return tuple(held for _, held in points_of(value))


def check_by_step(value: ByStep, flag: str, *, steps: int) -> None:
    """Refuse what is no positive number at some step of a stage.

    Raises:
        UserError: names the flag.
    """
    points = points_of(value)
    for held in values_of(value):
        if held < 1:
            raise UserError(f"{flag} is {held}; it must be at least 1")
    firsts = [first for first, _ in points]
    if not points or firsts[0] != 0 or firsts != sorted(set(firsts)):
        raise UserError(
            f"{flag} is {value}: write one number, or STEP VALUE points with rising steps, from 0 on"
        )
    if firsts[-1] >= steps:
        raise UserError(
            f"{flag} changes at step {firsts[-1]}, which a stage of {steps} steps never reaches: give it "
            "other points, or the stage more steps"
        )
