"""Two stages of a tiny captioner, for the tests of interruptions: 40 steps, then 20 with a change of size.

PACE holds STEPS:SECONDS for each start that Slurm gives a job, and the last one counts for all that follow:
how many steps of a process are quick, and how much longer each takes from then on, so that it is still there
when a test on a busy machine gets to it. As long as the file STALLS exists, no checkpoint gets to the disk.
"""

import os
import time
from dataclasses import replace
from itertools import count
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

_paces = os.environ.get("PACE", "0:0").split(",")
_pace = _paces[min(int(os.environ.get("SLURM_RESTART_COUNT", "0")), len(_paces) - 1)]
_quick, _seconds = map(int, _pace.split(":"))
_begun = count(1)
register_optimizer_step_post_hook(lambda *_: time.sleep(_seconds if next(_begun) > _quick else 0))
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
