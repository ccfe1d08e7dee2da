"""A recipe in which everything changes that can change from stage to stage, and inside one."""

from datasets.sources import SourceConfig
from datasets.views import Augment
from objectives.itc import ITC
from objectives.lm import LM
from pretrain.config import Cadence, Run
from pretrain.optim import Optim
from pretrain.precision import Precision
from pretrain.sinks.mirrored import Wandb
from pretrain.stage import Stage
from pretrain.zoo.captioner import Captioner
from pretrain.zoo.models import DualConfig, SmallText


def recipe() -> Run:
    """Captioning; then contrast and captioning on two sources, smaller and larger; then Lion on a part."""
    optim = Optim(lr=1e-3, warmup=2)
    return Run(
        sources={"pairs": SourceConfig(), "more": SourceConfig(captions="all")},
        model=DualConfig(
            embed=16, text=SmallText(width=16, layers=1), captioner=Captioner.Config(width=16, layers=1)
        ),
        objectives={"itc": ITC.Config(), "lm": LM.Config()},
        vocabulary=300,
        stages={
            "one": Stage(
                steps=6, batch=16, resolution=16, sources={"pairs": 1.0}, objectives={"lm": 1.0}, optim=optim
            ),
            "two": Stage(
                steps=8,
                batch=((0, 32), (4, 16)),
                micro_batches=((0, 1), (4, 2)),
                resolution=((0, 16), (4, 24)),
                sources={"pairs": 3.0, "more": ((0, 1.0), (8, 3.0))},
                objectives={"itc": 0.5, "lm": ((0, 1.0), (8, 0.0))},
                optim=Optim(lr=5e-4, warmup=0, schedule="linear"),
                ema=0.9,
                augment=Augment(crop=0.9),
            ),
            "three": Stage(
                steps=4,
                batch=16,
                resolution=24,
                trainable={"image.*": 0.0, "captioner.*": 0.1},
                optim=Optim(kind="lion", lr=1e-4, warmup=0, schedule="constant"),
                moments="fresh",
            ),
        },
        precision=Precision(threads=1),
        wandb=Wandb(mode="disabled"),
        cadence=Cadence(report=2, checkpoint=3, keep=2, keep_every=1),
    )
