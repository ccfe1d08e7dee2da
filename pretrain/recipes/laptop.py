"""The default: contrast and captioning on built-in scenes, in minutes on two CPU cores."""

from objectives.itc import ITC
from objectives.lm import LM
from pretrain.config import Run
from pretrain.zoo.models import DualConfig


def recipe() -> Run:
    """Small towers, 64 px."""
    return Run(model=DualConfig(), objectives={"itc": ITC.Config(), "lm": LM.Config()})
