"""The recipe of a laptop, for runs in HELD/../run that are held up as long as files are in the folder HELD.

start       when all is imported and nothing has begun
building    when the first stage is built
steps       before step HELD_AT (or 15) and each after it, once step 10 is saved, and until asked to stop
disk        when a checkpoint is written
"""

import os
import sys
import time
from pathlib import Path

from pretrain import prepare
from pretrain.recipes import laptop
from pretrain.supervise import newest_step
from pretrain.testing import hold_steps, stall_checkpoints

HELD = Path(os.environ["HELD"])
PREEMPTION = sys.modules["__main__"].PREEMPTION  # that of pretrain.launch


def wait(name: str) -> None:
    while (HELD / name).exists():
        time.sleep(0.01)


def built(*arguments, **named):
    wait("building")
    return build_tokenizer(*arguments, **named)


def held() -> bool:
    return (HELD / "steps").exists() and newest_step(HELD.parent / "run") >= 10 and not PREEMPTION.asked()


wait("start")
build_tokenizer, prepare.build_tokenizer = prepare.build_tokenizer, built
hold_steps(int(os.environ.get("HELD_AT", "15")), held)
stall_checkpoints(HELD / "disk")
recipe = laptop.recipe
