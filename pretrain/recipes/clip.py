"""CLIP ViT-B/32 (Radford et al., arXiv 2103.00020): contrast alone, 12.8 billion samples.

Batch, learning rate, warm-up and decay are those of the paper's appendix F, which open_clip repeats; the
crop is open_clip's. Name the data with --data.
"""

from dataclasses import replace

from datasets.sources import SourceConfig
from datasets.views import Augment
from objectives.itc import ITC
from pretrain.config import Run
from pretrain.optim import Optim
from pretrain.recipes import laptop
from pretrain.stage import Stage
from pretrain.zoo.models import OpenClipConfig


def recipe() -> Run:
    """As published: 32 epochs of 400 million pairs."""
    optim = Optim(lr=5e-4, warmup=2_000, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, clip=0.0)
    return Run(
        sources={"data": SourceConfig(data="")},
        model=OpenClipConfig(name="ViT-B-32"),
        objectives={"itc": ITC.Config()},
        stages={
            "one": Stage(
                steps=390_625,
                batch=32_768,
                resolution=224,
                optim=optim,
                augment=Augment(crop=0.9, flip=False),
            )
        },
    )


def small() -> Run:
    """The same objective and view on the laptop's towers, built-in data and budget."""
    published, base = recipe(), laptop.recipe()
    stages = {
        name: replace(stage, augment=published.stages[name].augment) for name, stage in base.stages.items()
    }
    return replace(base, objectives=published.objectives, stages=stages)
