"""Adding up what objectives say, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from objectives.base import Terms

_At = TypeVar("_At")


def accumulate(sums: dict[_At, Tensor], at: _At, value: Tensor) -> None:
    """Add a value to what stands under a name."""
    sums[at] = sums[at] + value if at in sums else value


def add_terms(said: Sequence[Mapping[str, Terms]]) -> dict[str, Tensor]:
    """() sums of raw terms: `loss/NAME` and `NAME/METRIC` of each objective."""
    sums: dict[str, Tensor] = {}
    for one in said:
        for name, terms in one.items():
            for at, value in {"": terms.total, **terms.metrics}.items():
                accumulate(sums, f"{name}/{at}" if at else f"loss/{name}", value.detach())
    return sums
