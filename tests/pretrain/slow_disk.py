"""The recipe of a laptop, on a disk that keeps checkpoints waiting as long as the file STALLS exists."""

import os
from pathlib import Path

from pretrain.recipes import laptop
from pretrain.testing import stall_checkpoints

stall_checkpoints(Path(os.environ["STALLS"]))
recipe = laptop.recipe
