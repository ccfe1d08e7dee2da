"""Two stages of captioning with the published numbers of CogVLM (arXiv 2311.03079, table 5).

Stage one sees 983 million of 1.5 billion pairs at 224 px. Stage two goes on with what the optimizer knows:
30,000 steps at 224 px, then as many at 490 px, where position embeddings are resampled from 16 x 16 to
35 x 35 patches. The model is an encoder-decoder captioner of the zoo, trained from random weights; CogVLM's
own, a frozen language model with a visual expert, is none of it. The paper says that weights are averaged,
not how slowly: the decay is ours. Name the data with --data.
"""

from dataclasses import replace

from datasets.sources import SourceConfig
from datasets.views import Augment
from objectives.lm import LM
from pretrain.config import Cadence, Eval, Run
from pretrain.optim import Optim
from pretrain.stage import Stage
from pretrain.zoo.captioner import Captioner
from pretrain.zoo.models import DualConfig, SmallText


def recipe() -> Run:
    """As published: batches of 8,192, then of 1,024."""
    optim = Optim(lr=1e-4, warmup=12_000, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
    whole = Augment(crop=1.0, flip=False)
    return Run(
        sources={"data": SourceConfig(data="")},
        model=DualConfig(
            image="timm:vit_large_patch14_clip_224",
            text=SmallText(context_length=77),
            captioner=Captioner.Config(width=1024, layers=12, heads=16),
        ),
        vocabulary=32_768,
        objectives={"lm": LM.Config()},
        stages={
            "one": Stage(steps=120_000, batch=8_192, resolution=224, optim=optim, ema=0.9999, augment=whole),
            "two": Stage(
                steps=60_000,
                batch=1_024,
                micro_batches=((0, 1), (30_000, 4)),
                resolution=((0, 224), (30_000, 490)),
                optim=replace(optim, lr=1e-5, warmup=1_200),
                ema=0.9999,
                augment=whole,
            ),
        },
        cadence=Cadence(report=100, checkpoint=2_000, keep=3),
        loader_threads=8,
    )


def small() -> Run:
    """The same two stages and switch on the laptop's towers, built-in data and minutes."""
    published = recipe()
    one, two = published.stages["one"], published.stages["two"]
    optim = replace(one.optim, lr=2e-3, warmup=50)
    stages = {
        "one": replace(one, steps=600, batch=64, resolution=64, optim=optim, ema=0.99),
        "two": replace(
            two,
            steps=240,
            batch=32,
            micro_batches=((0, 1), (120, 2)),
            resolution=((0, 64), (120, 112)),
            optim=replace(optim, lr=5e-4, warmup=10),
            ema=0.99,
        ),
    }
    return replace(
        published,
        sources={"data": SourceConfig()},
        model=DualConfig(),
        vocabulary=4_096,
        stages=stages,
        cadence=Cadence(report=20, checkpoint=100),
        eval=Eval(),
        loader_threads=2,
    )
