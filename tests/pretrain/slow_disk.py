"""The recipe of a laptop, on a disk that keeps checkpoints waiting as long as the file STALLS exists."""

import os
import time
from pathlib import Path

from pretrain.recipes import laptop

_real = os.fsync


def _fsync(descriptor: int) -> None:
    file, stalls = Path(f"/proc/self/fd/{descriptor}").readlink(), Path(os.environ["STALLS"])
    while "checkpoints" in file.parts and stalls.exists():
        time.sleep(0.05)
    _real(descriptor)


os.fsync = _fsync
recipe = laptop.recipe
