"""Objectives: what can be minimised. One file each; adding one is that file and one line here."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from datasets.errors import UserError

if TYPE_CHECKING:
    from objectives.base import Objective

OBJECTIVES = {
    "itc": "objectives.itc.ITC",
    "siglip": "objectives.siglip.SigLIP",
    "itm": "objectives.itm.ITM",
    "lm": "objectives.lm.LM",
}
"""Kind -> class, as dotted strings: an objective is imported only when it is chosen."""


def objective_class(kind: str) -> type[Objective]:
    """The class of a kind of objective.

    Raises:
        UserError: no such kind; names the nearest one.
    """
    if kind not in OBJECTIVES:
        near = get_close_matches(kind, OBJECTIVES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown objective {kind!r}; {hint}Known: {', '.join(sorted(OBJECTIVES))}")
    module, _, name = OBJECTIVES[kind].rpartition(".")
    return getattr(import_module(module), name)


def kind_of(config: Objective.Config) -> str:
    """The kind whose class owns this configuration."""
    owner = f"{type(config).__module__}.{type(config).__qualname__.removesuffix('.Config')}"
    return {dotted: kind for kind, dotted in OBJECTIVES.items()}[owner]
