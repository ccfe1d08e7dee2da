"""A tokenizer of which only the sizes are known: its words would be learned from data that are not here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Sizes:
    """What a model is built by; nothing can be encoded with it."""

    vocabulary: int
    context_length: int
    start: int | None = 1
    end: int = 2
    pad: int = 0
    fingerprint: str = ""

    def encode(self, text: str) -> list[int]:
        """No text has ids."""
        raise NotImplementedError(text)

    def decode(self, ids: Sequence[int]) -> str:
        """No ids are a text."""
        raise NotImplementedError(ids)
