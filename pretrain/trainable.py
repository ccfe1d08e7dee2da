"""Which parameters train, and how fast beside the others: patterns over their names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from datasets.errors import UserError

_MODEL = "model."


def check_trainable(patterns: Mapping[str, float], flag: str) -> None:
    """Refuse multipliers that are none.

    Raises:
        UserError: names the flag and the pattern.
    """
    for pattern, multiplier in patterns.items():
        if not 0 <= multiplier < math.inf:
            raise UserError(f"{flag} {pattern!r} is {multiplier}; it must be at least 0, which freezes")


def set_trainable(module: nn.Module, patterns: Mapping[str, float], *, flag: str) -> dict[str, float]:
    """Freeze what the patterns say, before the module is wrapped; how fast the rest learns.

    A pattern is a glob over parameter names, which may leave out `model.`: `image.*`; its `*` reaches
    across dots. Of several that match, the last one counts. A parameter that has two names (tied weights) is
    matched by either.

    Args:
        module: a `Pretrainer`; what does not require a gradient stays as it is.
        patterns: to multipliers of the learning rate, 0 to freeze.
        flag: what the patterns were given by, for the errors.

    Returns:
        Multipliers by name, of what trains.

    Raises:
        UserError: a pattern matches nothing, or would let something learn that no objective reads, or nothing
            is left to train.
    """
    check_trainable(patterns, flag)
    named = list(module.named_parameters(remove_duplicate=False))
    chosen: dict[int, float] = {}
    for pattern, multiplier in patterns.items():
        matched = [parameter for name, parameter in named if _matches(name, pattern)]
        if not matched:
            hint = _hint(pattern, [name for name, _ in named])
            raise UserError(f"{flag} {pattern!r} matches no parameter: {hint}")
        if multiplier and not any(parameter.requires_grad for parameter in matched):
            raise UserError(
                f"{flag} {pattern!r} is {multiplier:g} for what does not train in this stage, as no "
                "objective of it reads that, or its maker froze it: leave the pattern out"
            )
        chosen |= dict.fromkeys(map(id, matched), multiplier)
    for parameter in module.parameters():
        if chosen.get(id(parameter)) == 0:
            parameter.requires_grad_(False)
    multipliers = {
        name: chosen.get(id(each), 1.0) for name, each in module.named_parameters() if each.requires_grad
    }
    if not multipliers:
        raise UserError(f"{flag} freezes every parameter: leave some of them a multiplier above 0")
    return multipliers


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removeprefix(_MODEL), pattern)


def _hint(pattern: str, names: list[str]) -> str:
    """What may have been meant: what the name of a module stands before, or the nearest names."""
    bare = pattern.rstrip(".*")
    for whole in (bare, _MODEL + bare):
        if bare and any(name.startswith(f"{whole}.") for name in names):
            return f"for all of it write '{bare}.*'"
    parts = {name.rsplit(".", depth)[0] + ".*" for name in names for depth in range(1, name.count(".") + 1)}
    known = {each.removeprefix(_MODEL) for each in (*names, *parts)}
    near = get_close_matches(pattern.removeprefix(_MODEL), sorted(known), n=3, cutoff=0.0)
    return f"the nearest are {', '.join(near)}"
