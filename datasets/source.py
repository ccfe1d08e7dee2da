"""What a source of samples must be able to say. Tar shards and built-in scenes are the two we have."""

from __future__ import annotations

from typing import Literal, Protocol

from datasets.sample import Sample

Field = Literal["image", "text", "boxes"]


class Source(Protocol):
    """Samples by index. Reading is a pure function of its arguments, from any thread."""

    name: str
    """How errors and reports call it."""
    fields: frozenset[Field]
    """What its samples hold; an objective that needs more is refused before training starts."""
    fingerprint: str
    """Hex digest of the content: a checkpoint is not resumed on other data."""
    size: int | None
    """Samples in an epoch, or None for a source without end."""

    def read(self, index: int, *, seed: tuple[int, ...], resolution: int, train: bool) -> Sample:
        """The sample at `index`.

        Args:
            index: 0 <= index < size, or any index >= 0 of an endless source.
            seed: the key of every random choice made for this reading (run seed, epoch, index).
            resolution: side of the square image in pixels.
            train: draw a random view (crop, flip) rather than the one fixed view.
        """
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of the sample at `index` without its pixels; none where it cannot be read."""
        ...
