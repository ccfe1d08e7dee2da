"""The default: contrast and captioning on built-in scenes, in minutes on two CPU cores."""

from objectives.itc import ITC
from objectives.lm import LM
from pretrain.config import Cadence, Eval, Run
from pretrain.optim import Optim
from pretrain.stage import Stage
from pretrain.zoo.models import DualConfig


def recipe() -> Run:
    """Small towers, 64 px, small batches: on two cores many steps are worth more than large ones."""
    optim = Optim(kind="muon", lr=4e-3, warmup=100, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
    return Run(
        model=DualConfig(),
        objectives={"itc": ITC.Config(), "lm": LM.Config()},
        stages={"one": Stage(steps=1_250, batch=64, resolution=64, optim=optim)},
        cadence=Cadence(report=50, checkpoint=500),
        eval=Eval(every=500),
    )
