"""The square part of an image that a model gets to see, and where boxes lie in it.

H W pixels of the image, R pixels of the square's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, sqrt

import torch.nn.functional as F
from torch import Tensor

from datasets.draws import draws
from datasets.errors import UserError

Box = tuple[float, float, float, float]
_ASPECT = 4 / 3  # the most that a random crop is stretched, either way
_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How random the views of training images are."""

    crop: float = 0.6
    """The least share of an image's area that a random crop keeps, in 0..1."""
    flip: bool = True
    """Mirror half of the images."""

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise UserError(f"crop is the least share of the area to keep, in (0, 1], not {self.crop}")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A rectangle of an image of H x W pixels, perhaps mirrored."""

    image: tuple[int, int]
    """H, W"""
    top: int
    left: int
    height: int
    width: int
    flip: bool = False

    def pixels(self, image: Tensor, *, resolution: int) -> Tensor:
        """(3, R, R) uint8 of a (3, H, W) uint8 image, antialiased bicubic as Pillow's."""
        assert image.shape == (3, *self.image), (image.shape, self)
        part = image[None, :, self.top : self.top + self.height, self.left : self.left + self.width]
        square = F.interpolate(part, size=(resolution, resolution), mode="bicubic", antialias=True)[0]
        return square.flip(-1) if self.flip else square

    def box(self, box: Box) -> Box | None:
        """A box x0, y0, x1, y1 in 0..1 of the image as it lies in the view; None if it lies outside."""
        height, width = self.image
        x0 = max((box[0] * width - self.left) / self.width, 0.0)
        y0 = max((box[1] * height - self.top) / self.height, 0.0)
        x1 = min((box[2] * width - self.left) / self.width, 1.0)
        y1 = min((box[3] * height - self.top) / self.height, 1.0)
        if x0 >= x1 or y0 >= y1:
            return None
        return (1 - x1, y0, 1 - x0, y1) if self.flip else (x0, y0, x1, y1)


def fixed_view(height: int, width: int) -> View:
    """The central square, as large as it can be."""
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return View(image=(height, width), top=top, left=left, height=side, width=side)


def random_view(height: int, width: int, *, augment: Augment, key: tuple[int, ...]) -> View:
    """The random resized crop of Szegedy et al. 2015 and a mirror, both drawn by `key`.

    The share of the area is uniform in crop..1, the logarithm of the aspect uniform in 3/4..4/3; what does
    not fit is drawn again, and an image too narrow for it gives its largest central part of such an aspect.
    """
    flip = augment.flip and draws("flip", *key)[0] < 0.5
    for attempt in range(_TRIES):
        share, stretch, down, right, *_ = draws("crop", attempt, *key)
        area = height * width * (augment.crop + share * (1 - augment.crop))
        aspect = exp((2 * stretch - 1) * log(_ASPECT))
        h, w = round(sqrt(area / aspect)), round(sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
            return View(image=(height, width), top=top, left=left, height=h, width=w, flip=flip)
    h, w = min(height, round(width * _ASPECT)), min(width, round(height * _ASPECT))
    top, left = (height - h) // 2, (width - w) // 2
    return View(image=(height, width), top=top, left=left, height=h, width=w, flip=flip)
