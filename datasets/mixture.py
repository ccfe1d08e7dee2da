"""How the slots of a global batch are shared among sources, step by step, exactly.

A source is given whole quanta of slots. What its share leaves over is carried as credit, so that a share of
less than a quantum appears every few steps and no window of steps gives a source more or less than its due.
Integers only, and nothing that depends on ranks: the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

_UNIT = 1 << 32
"""Credit of one quantum."""


@dataclass(frozen=True, slots=True)
class Account:
    """Where one source of a mixture stands: all that resuming it needs."""

    position: int = 0
    """Samples of the source that were used."""
    credit: int = 0
    """What it is owed beyond them, in 2**-32 of a quantum; negative where it is ahead of its share."""


def allot(
    accounts: Mapping[str, Account], weights: Mapping[str, float], *, batch: int, quantum: int
) -> dict[str, Account]:
    """The accounts after one more step.

    What a source gets, its new position less its old one, is a multiple of `quantum`; together they get
    `batch`. Every source is credited its share and then the quanta go one by one to the largest credit of a
    source that has a weight. No credit of n sources then leaves (n - 1) / 2 quanta, however weights change,
    so over any window of steps a source gets its share to within n - 1 quanta.

    Args:
        accounts: of every source, before the step.
        weights: of every source in this step, in any unit; at least one is above zero.
        batch: slots of the global batch.
        quantum: the least that a source is given at once; divides `batch`, except where there is one source.
    """
    if len(accounts) == 1:
        return {name: Account(before.position + batch) for name, before in accounts.items()}
    assert batch % quantum == 0, (batch, quantum)
    quanta = batch // quantum
    credit = {name: accounts[name].credit + due for name, due in _due(weights, quanta).items()}
    # All but the last few quanta need no comparison: whoever is owed this many gets them in any case.
    given = {name: max(0, owed // _UNIT - len(accounts)) for name, owed in credit.items()}
    for _ in range(quanta - sum(given.values())):
        open_ = [name for name in accounts if weights[name] > 0]
        first = max(open_, key=lambda name: credit[name] - given[name] * _UNIT)
        given[first] += 1
    return {
        name: Account(before.position + given[name] * quantum, credit[name] - given[name] * _UNIT)
        for name, before in accounts.items()
    }


def _due(weights: Mapping[str, float], quanta: int) -> dict[str, int]:
    """The share of each source in `quanta`, in units of credit, adding up exactly."""
    total = sum(map(Fraction, weights.values()))
    reached, before = Fraction(0), 0
    due: dict[str, int] = {}
    for name, weight in weights.items():
        reached += Fraction(weight)
        now = int(reached / total * quanta * _UNIT)
        due[name], before = now - before, now
    return due
