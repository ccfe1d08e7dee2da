"""Captions against references."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from datasets.tokens import normalise


def exact_match(captions: Sequence[str], references: Iterable[Sequence[str]]) -> float:
    """Share of captions that equal one of their references, after normalisation."""
    hits = [
        normalise(caption) in {normalise(reference) for reference in right}
        for caption, right in zip(captions, references, strict=True)
    ]
    return sum(hits) / len(hits)
