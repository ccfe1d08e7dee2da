"""What a source of samples must be able to say. Tar shards and built-in scenes are the two we have."""

from __future__ import annotations

from typing import Final, Literal, Protocol

from datasets.sample import Sample
from datasets.views import Augment

Field = Literal["image", "text", "boxes", "label"]
EVERYTHING: Final[frozenset[Field]] = frozenset(("image", "text", "boxes", "label"))


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
    remote: bool
    """Whether reading waits for a network, so that `prefetch` is worth calling."""

    def read(
        self,
        index: int,
        *,
        seed: tuple[int, ...],
        resolution: int,
        augment: Augment | None = None,
        fields: frozenset[Field] = EVERYTHING,
    ) -> Sample:
        """The sample at `index`; one that cannot be read says so in its `fault`.

        Args:
            index: 0 <= index < size, or any index >= 0 of an endless source.
            seed: the key of every random choice made for this reading (run seed, epoch, index).
            resolution: side of the square image in pixels.
            augment: how random the view is that `seed` draws; None for the one fixed view.
            fields: what is asked for: nothing else is read, decoded or missed.
        """
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of the sample at `index` without its pixels; none where it cannot be read."""
        ...

    def prefetch(self, index: int) -> None:
        """Begin to fetch what the sample at `index` needs, and return at once."""
        ...
