"""One sample as it comes from a source: pixels, captions, phrases with boxes, or the reason it is masked.

H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from datasets.errors import Kind


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a sample is masked. In words it is `str(fault)`."""

    kind: Kind
    """What it is counted under."""
    reason: str
    """What is wrong, for a person."""
    shard: str = ""
    """The shard that holds the sample, where there is one."""
    offset: int = -1
    """Where in the shard the sample begins, in bytes; -1 where that is not known."""

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Phrase:
    """A phrase of a caption and the box it names."""

    text: str
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in 0..1 of the image."""
    caption: int = 0
    """Which of the sample's captions it is a phrase of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a source says about one index.

    A sample that could not be read keeps its slot: `fault` says why, and there is nothing else in it.
    Positions never shift because of bad data; the loss leaves the slot out.
    """

    key: str
    """Names the sample within its source, e.g. `00000.tar/000000012`."""
    image: Tensor | None
    """(3, H, W) uint8, or None for text alone."""
    captions: tuple[str, ...]
    phrases: tuple[Phrase, ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """Of each caption, where the captions are phrases: the box it names, in the image as it is here."""
    cut_off: int = 0
    """Phrases whose boxes lie outside the view."""
    label: str | int | None = None
    """The class, by name or by number, where the source knows one."""
    shard: str = ""
    """The shard that holds it, where there is one."""
    offset: int = -1
    """Where in the shard it begins, in bytes; -1 where that is not known."""
    fault: Fault | None = None
