"""How a model was trained to see pixels, as numbers for a configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.zoo.towers import ImageTower
from pretrain.zoo.vision import PixelTower


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalisation:
    """Of pixels in 0..1, one number for each of red, green and blue."""

    mean: list[float]
    std: list[float]


def normalisation_of(image: ImageTower) -> Normalisation:
    """What the tower subtracts and divides by."""
    assert isinstance(image, PixelTower), type(image)
    return Normalisation(mean=_in_unit(image.mean), std=_in_unit(image.std))


def _in_unit(scaled: Tensor) -> list[float]:
    """The numbers that were multiplied by 255: as they are written in timm, or what division gives back."""
    from timm.data import constants

    for known in vars(constants).values():
        if isinstance(known, tuple) and torch.equal(255 * torch.tensor(known), scaled.flatten().float()):
            return list(known)
    return [round(one / 255, 8) for one in scaled.flatten().tolist()]
