"""The recipe stages:small, held after three steps as long as there is a file HELD and nobody asks to stop."""

import os
import sys
from pathlib import Path

from pretrain.recipes.stages import small as recipe
from pretrain.testing import hold_steps

__all__ = ["recipe"]

launched = getattr(sys.modules["__main__"], "PREEMPTION", None)
if launched is not None:  # in pretrain.launch, not where it is submitted
    asked = launched.asked
    hold_steps(3, lambda: Path(os.environ["HELD"]).exists() and not asked())
