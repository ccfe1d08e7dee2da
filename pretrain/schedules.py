"""Learning-rate schedules: of the way from the floor to the peak, the share that a step stands at.

All are pure functions of the step of a stage, so nothing of them is saved. `Optim.lr_at` puts them together
and adds the linear warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["cosine", "linear", "rsqrt", "wsd", "step", "constant"]
"""The shape of the learning rate after its warm-up."""


def cosine(done: float) -> float:
    """Half a cosine (arXiv 1608.03983, without restarts).

    Args:
        done: part of the steps after the warm-up that is done, 0..1.
    """
    return 0.5 * (1 + math.cos(math.pi * done))


def linear(done: float) -> float:
    """A straight line to zero.

    Args:
        done: part of the steps after the warm-up that is done, 0..1.
    """
    return 1 - done


def rsqrt(past: int, *, timescale: int) -> float:
    """One over the square root of time, as big_vision has it (create_learning_rate_schedule).

    Args:
        past: steps since the warm-up.
        timescale: after so many steps it has fallen to 1/sqrt(2).
    """
    return 1 / math.sqrt(1 + past / timescale)


def stepped(step: int, *, milestones: Sequence[int], factor: float) -> float:
    """Times a factor at each milestone that is reached."""
    return factor ** sum(step >= milestone for milestone in milestones)


def cooling(left: int, *, cooldown: int) -> float:
    """A straight line to zero over the last steps, 1 before them.

    The last phase of warm-up, stable, decay (arXiv 2404.06395, 2405.18392) and of big_vision's rsqrt.

    Args:
        left: steps that are left, this one among them.
        cooldown: how many the line takes; 0 for none.
    """
    return min(1.0, left / cooldown) if cooldown else 1.0
