"""What asking a server once comes to: bytes, a failure that may pass, or one that will not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Answer(NamedTuple):
    """The beginning of a range that was asked for."""

    total: int | None
    """Bytes of the whole object, where the server says it."""
    chunks: Iterator[bytes]
    """From the first byte asked for. They may end too early, or go on past what was asked for."""


class PassingError(Exception):
    """It may work when it is tried again."""

    def __init__(self, reason: str, *, pause: float = 0.0, attempts: float = float("inf")) -> None:
        super().__init__(reason)
        self.pause = pause
        """Seconds that the server asks to wait."""
        self.attempts = attempts
        """How often in a row it is worth trying."""


class GoneError(Exception):
    """It will not work, however often it is tried."""
