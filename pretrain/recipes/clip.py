"""CLIP ViT-B/32 (Radford et al., arXiv 2103.00020): contrast alone, 12.8 billion samples.

Batch, learning rate, warm-up and decay are those of the paper's appendix F, which open_clip repeats; the
crop is open_clip's. Name the data with --data.
"""

from dataclasses import replace

from datasets.sources import SourceConfig
from datasets.views import Augment
from objectives.itc import ITC
from pretrain.config import Run, Stage
from pretrain.optim import Optim
from pretrain.recipes import laptop
from pretrain.zoo.models import OpenClipConfig


def recipe() -> Run:
    """As published: 32 epochs of 400 million pairs."""
    optim = Optim(lr=5e-4, warmup=2_000, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, clip=0.0)
    return Run(
        sources={"data": SourceConfig(data="")},
        model=OpenClipConfig(name="ViT-B-32"),
        objectives={"itc": ITC.Config()},
        augment=Augment(crop=0.9, flip=False),
        stages={"one": Stage(steps=390_625, batch=32_768, resolution=224, optim=optim)},
    )


def small() -> Run:
    """The same objective and view on the laptop's towers, built-in data and budget."""
    published = recipe()
    return replace(laptop.recipe(), objectives=published.objectives, augment=published.augment)
