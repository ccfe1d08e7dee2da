"""Built-in data: coloured shapes on cluttered ground, with captions and boxes that follow from the scene.

A scene is a pure function of (seed, split, index): 1 to 4 objects, each a colour, a shape and a size. Its
one caption is canonical, so a generated caption is right exactly when it is equal. 8 of the 48
colour-shape combinations never occur in training. S pixels of a side.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from math import pi
from typing import Literal

import numpy as np
import torch

from datasets.drawing import COLOURS, NUMBERS, REACH, SHAPES, Thing, box, draw
from datasets.sample import Phrase, Sample
from datasets.source import EVERYTHING, Field
from datasets.views import Augment

SIZES: dict[str, tuple[float, float]] = {
    "small": (0.075, 0.09),
    "medium": (0.11, 0.13),
    "large": (0.155, 0.18),
}
"""Name -> least and greatest radius, in units of the image's side."""
NUMERALS = ("a", "two", "three", "four")

_NAMES = tuple(COLOURS)
COMBINATIONS = tuple((colour, shape) for colour in range(len(COLOURS)) for shape in range(len(SHAPES)))
"""All 48 (colour, shape); an index into this table is a zero-shot label."""
UNSEEN = tuple(
    COMBINATIONS.index((_NAMES.index(colour), SHAPES.index(shape)))
    for colour, shape in (
        ("red", "star"),
        ("orange", "circle"),
        ("yellow", "cross"),
        ("green", "triangle"),
        ("cyan", "square"),
        ("blue", "ring"),
        ("purple", "circle"),
        ("white", "star"),
    )
)
"""Labels that no object of any training scene has; every colour and every shape has others that do."""
SEEN = tuple(label for label in range(len(COMBINATIONS)) if label not in UNSEEN)

_CHOICES = {"seen": SEEN, "unseen": UNSEEN, "all": tuple(range(len(COMBINATIONS)))}
_REPEAT = 0.3
_SLOTS = 10  # random numbers of one object
_CELLS = ((0, 0), (1, 0), (0, 1), (1, 1))  # column, row of the quarters, in reading order
_LEANING = 0.75  # tangent of the steepest line between two objects of which one is still called left


def prompts(label: int) -> tuple[str, ...]:
    """The zero-shot prompts of a combination; its score is the best of them, not the mean.

    A caption always names a size and an image shows one, so the prompts are alternatives.
    """
    colour, shape = COMBINATIONS[label]
    return tuple(_mention(1, size, colour, shape) for size in range(len(SIZES)))


@dataclass(frozen=True, slots=True)
class Scene:
    """What there is to see, before it is drawn."""

    things: tuple[Thing, ...]
    cells: tuple[tuple[int, int], ...]
    """Column and row of each thing: its place in words."""
    caption: str
    phrases: tuple[Phrase, ...]


class _Streams(threading.local):
    """One counter-based generator per thread, set to a key: five times cheaper than making a new one."""

    def __init__(self) -> None:
        self._generator = np.random.Generator(np.random.Philox(key=0))

    def at(self, *key: int) -> np.random.Generator:
        """The generator at the start of the stream of two 64-bit words."""
        zero = np.zeros(4, dtype=np.uint64)
        self._generator.bit_generator.state = {
            "bit_generator": "Philox",
            "state": {"counter": zero, "key": np.array(key, dtype=np.uint64)},
            "buffer": zero,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator


class Scenes:
    """The built-in source. Endless for training, of a fixed size for tests."""

    fields: frozenset[Field] = frozenset({"image", "text", "boxes"})
    remote = False

    def __init__(
        self,
        *,
        seed: int = 0,
        split: Literal["train", "test"] = "train",
        size: int | None = None,
        counts: tuple[int, ...] = (1, 1, 1, 2, 2, 2, 3, 4),
        combinations: Literal["seen", "unseen", "all"] = "seen",
        distinct: bool = False,
    ) -> None:
        """Choose a stream of scenes.

        Args:
            seed: of the run; the two splits never share a scene's random numbers.
            split: which stream.
            size: scenes in it, or None for an endless one.
            counts: how many objects a scene has: one of these, each as likely.
            combinations: which colour-shape combinations occur. Single objects go through them in turn.
            distinct: leave out scenes whose caption came before; needs a size.
        """
        assert split == "test" or combinations == "seen", "training never shows an unseen combination"
        assert size is not None or not distinct, "only a finite set can be made distinct"
        self.name = "scenes"
        self.size = size
        self._key = 2 * seed + (split == "test")
        self._streams = _Streams()
        self._counts = counts
        self._choices = _CHOICES[combinations]
        self._index: tuple[int, ...] | None = None
        if distinct:
            self._index = tuple(islice(self._distinct(), size))
        content = (1, SIZES, COLOURS, SHAPES, UNSEEN, self._key, size, counts, combinations, distinct)
        self.fingerprint = hashlib.sha256(repr(content).encode()).hexdigest()

    def read(
        self,
        index: int,
        *,
        seed: tuple[int, ...],
        resolution: int,
        augment: Augment | None = None,
        fields: frozenset[Field] = EVERYTHING,
    ) -> Sample:
        """The sample at `index`, always the same one: a new view of it is simply another index."""
        scene, random = self._draw(index)
        image = None
        if "image" in fields:
            numbers, size = random.random(NUMBERS, dtype=np.float32), resolution * resolution
            grain = random.bit_generator.random_raw(-(-size // 8)).view(np.uint8)[:size]
            pixels = draw(scene.things, resolution=resolution, numbers=numbers, grain=grain)
            image = torch.from_numpy(pixels)  # pyright: ignore[reportUnknownMemberType]
        return Sample(
            key=f"{self.name}/{self._key}/{index}",
            image=image,
            captions=(scene.caption,),
            phrases=scene.phrases,
        )

    def prefetch(self, index: int) -> None:
        """Nothing: scenes are drawn."""

    def scene(self, index: int) -> Scene:
        """What the sample at `index` shows, without drawing it."""
        return self._draw(index)[0]

    def captions(self, index: int) -> tuple[str, ...]:
        """The caption of the sample at `index`, without drawing it."""
        return (self.scene(index).caption,)

    def label(self, index: int) -> int:
        """The combination of the first object: index into COMBINATIONS."""
        thing = self.scene(index).things[0]
        return COMBINATIONS.index((thing.colour, thing.shape))

    def _draw(self, index: int) -> tuple[Scene, np.random.Generator]:
        """A scene, and the generator that goes on to draw its background."""
        place = index if self._index is None else self._index[index]
        random = self._streams.at(self._key, place)
        numbers = iter(random.random(1 + _SLOTS * 4).tolist())
        many = self._counts[int(next(numbers) * len(self._counts))]
        first = self._choices[place % len(self._choices)] if many == 1 else None
        return _compose(many, numbers=numbers, choices=self._choices, first=first), random

    def _distinct(self) -> Iterator[int]:
        """The indices whose captions are new, in order."""
        known: set[str] = set()
        for index in count():
            caption = self._draw(index)[0].caption
            if caption not in known:
                known.add(caption)
                yield index


def _compose(many: int, *, numbers: Iterator[float], choices: tuple[int, ...], first: int | None) -> Scene:
    """Choose what each object is and where it stands; `first` fixes the first one's combination."""
    kinds: list[tuple[int, int, int]] = []
    for _ in range(many):
        pick, size, repeat = next(numbers), int(next(numbers) * len(SIZES)), next(numbers)
        colour, shape = COMBINATIONS[choices[int(pick * len(choices))] if first is None else first]
        again = bool(kinds) and repeat < _REPEAT
        kinds.append(kinds[int(repeat / _REPEAT * len(kinds))] if again else (size, colour, shape))
    radii = [low + next(numbers) * (high - low) for low, high in (_RADII[kind[0]] for kind in kinds)]
    cells, centres = _PLACES[many](radii, numbers)
    things = tuple(
        Thing(
            colour=colour,
            shape=shape,
            size=size,
            x=x,
            y=y,
            radius=radius,
            angle=(next(numbers) - 0.5) * (pi / 6),
            tint=(next(numbers) * 0.16 - 0.08, next(numbers) * 0.16 - 0.08, next(numbers) * 0.16 - 0.08),
        )
        for (size, colour, shape), radius, (x, y) in zip(kinds, radii, centres, strict=True)
    )
    return _describe(things, cells)


_RADII = tuple(SIZES.values())
_Placed = tuple[tuple[tuple[int, int], ...], list[tuple[float, float]]]


def _within(number: float, low: float, high: float, radius: float) -> float:
    """A centre such that the object lies between low and high."""
    margin = REACH * radius
    return low + margin + number * (high - low - 2 * margin)


def _place_one(radii: list[float], numbers: Iterator[float]) -> _Placed:
    """Anywhere."""
    return _CELLS[:1], [(_within(next(numbers), 0, 1, radii[0]), _within(next(numbers), 0, 1, radii[0]))]


def _place_two(radii: list[float], numbers: Iterator[float]) -> _Placed:
    """In two halves, left and right or top and bottom, and never so slanted that it could be either."""
    upright = next(numbers) < 0.5
    a, b = (_within(next(numbers), 0.5 * i, 0.5 * (i + 1), radius) for i, radius in enumerate(radii))
    c = _within(next(numbers), 0, 1, radii[0])
    slant, margin = (b - a) * _LEANING, REACH * radii[1]
    low, high = max(c - slant, margin), min(c + slant, 1 - margin)
    d = low + next(numbers) * (high - low)
    return (_CELLS[0], _CELLS[2 if upright else 1]), [(c, a), (d, b)] if upright else [(a, c), (b, d)]


def _place_more(radii: list[float], numbers: Iterator[float]) -> _Placed:
    """One to a quarter."""
    empty = int(next(numbers) * 4) if len(radii) == 3 else 4
    cells = _CELLS[:empty] + _CELLS[empty + 1 :]
    return cells, [
        (
            _within(next(numbers), 0.5 * column, 0.5 * (column + 1), radius),
            _within(next(numbers), 0.5 * row, 0.5 * (row + 1), radius),
        )
        for (column, row), radius in zip(cells, radii, strict=True)
    ]


_PLACES = {1: _place_one, 2: _place_two, 3: _place_more, 4: _place_more}


def _describe(things: tuple[Thing, ...], cells: tuple[tuple[int, int], ...]) -> Scene:
    """The canonical caption: equal objects are counted, mentions stand in reading order of their first.

    Two mentions of which one is wholly left of or above the other say so; otherwise they are listed.
    """
    groups: dict[tuple[int, int, int], list[int]] = {}
    for i, thing in enumerate(things):
        groups.setdefault((thing.size, thing.colour, thing.shape), []).append(i)
    relation = ""
    if len(groups) == 2:
        one, other = groups.values()
        for axis, word in enumerate((" left of ", " above ")):
            a, b = ({cells[i][axis] for i in members} for members in (one, other))
            if not a & b:
                relation = word
                if min(a) > min(b):
                    groups = dict(reversed(groups.items()))
    mentions = [_mention(len(members), *kind) for kind, members in groups.items()]
    caption = (relation or " and ").join(filter(None, (", ".join(mentions[:-1]), mentions[-1])))
    boxes = [_union([box(things[i]) for i in members]) for members in groups.values()]
    phrases = tuple(Phrase(text=text, box=where) for text, where in zip(mentions, boxes, strict=True))
    return Scene(things, cells, caption, phrases)


def _mention(many: int, size: int, colour: int, shape: int) -> str:
    """A noun phrase, e.g. `two small red crosses`."""
    noun = SHAPES[shape]
    if many > 1:
        noun += "es" if noun.endswith("s") else "s"
    return f"{NUMERALS[many - 1]} {_SIZE_NAMES[size]} {_NAMES[colour]} {noun}"


_SIZE_NAMES = tuple(SIZES)


def _union(boxes: list[tuple[float, float, float, float]]) -> tuple[float, float, float, float]:
    """The smallest box around all."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)
