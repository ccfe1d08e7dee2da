"""Two stages of a tiny captioner, for the tests of interruptions: 40 steps, then 20 with a change of size.

PACE holds seconds that every step takes longer, one number for each start that Slurm gives a job; the last
one counts for all that follow. As long as the file STALLS exists, no checkpoint gets to the disk.
"""

import os
import time
from dataclasses import replace
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

from datasets.sources import SourceConfig
from objectives.lm import LM
from pretrain.config import Cadence, Run
from pretrain.optim import Optim
from pretrain.precision import Precision
from pretrain.sinks.mirrored import Wandb
from pretrain.stage import Stage
from pretrain.testing import stall_checkpoints
from pretrain.zoo.captioner import Captioner
from pretrain.zoo.models import DualConfig, SmallText

_paces = [float(each) for each in os.environ.get("PACE", "0").split(",")]
_pace = _paces[min(int(os.environ.get("SLURM_RESTART_COUNT", "0")), len(_paces) - 1)]
if _pace:
    register_optimizer_step_post_hook(lambda *_: time.sleep(_pace))
if stalls := os.environ.get("STALLS"):
    stall_checkpoints(Path(stalls))


def recipe() -> Run:
    """Half a second of work, were it not for PACE."""
    stage = Stage(steps=40, batch=16, resolution=16, optim=Optim(kind="adamw", lr=1e-3, warmup=4))
    return Run(
        sources={"data": SourceConfig(data="scenes")},
        vocabulary=300,
        model=DualConfig(
            embed=16,
            text=SmallText(width=16, layers=1),
            captioner=Captioner.Config(width=16, layers=1),
        ),
        objectives={"lm": LM.Config()},
        stages={"one": stage, "two": replace(stage, steps=20, resolution=((0, 16), (10, 32)))},
        precision=Precision(threads=1),
        cadence=Cadence(report=1, checkpoint=10),
        wandb=Wandb(mode="disabled"),
    )
