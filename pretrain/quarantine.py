"""Interface as the lead calls it (launch.py, loop.py); owner E replaces this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many samples may be unreadable."""

    overall: float = 0.02
    """Share of the samples read so far that may be masked."""
    shard: float = 0.2
    """Share of one shard's samples that may be bad."""

    def check(self) -> None:
        """Refuse."""


class Quarantine:
    """The list."""

    def __init__(self, path: Path, budget: Budget, *, samples_of: Callable[[str, str], int | None]) -> None:
        self.said: set[str] = set()

    def add(self, masked: Sequence[Any], *, step: int) -> list[str]:
        """Append."""
        new = [one for one in masked if one.key not in self.said]
        self.said |= {one.key for one in new}
        return [f"masked sample {one.key}: {one.fault}" for one in new]

    def verdict(self, samples: int) -> str | None:
        """Why to stop."""

    def flush(self) -> None:
        """Sync."""

    def close(self) -> None:
        """Close."""
