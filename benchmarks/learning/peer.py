"""Runs in open_clip's own environment, and imports nothing of Medley: train, then convert the checkpoints.

    python -I peer.py MODEL.json CHECKPOINTS [arguments of open_clip_train.main ...]

open_clip_train is left as it is released. Its checkpoints are of a kind that can run code; what they hold is
written as safetensors beside them, here, where they come from.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch import Tensor


def main() -> None:
    """Read the command line, train, convert."""
    import open_clip
    from open_clip.factory import load_state_dict
    from open_clip_train.main import main as train
    from safetensors.torch import save_file

    model, checkpoints, *arguments = sys.argv[1:]
    open_clip.add_model_config(model)
    train(arguments)
    for path in Path(checkpoints).glob("epoch_*.pt"):
        weights = cast("dict[str, Tensor]", load_state_dict(str(path)))
        contiguous = {name: each.contiguous() for name, each in weights.items()}
        save_file(contiguous, path.with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
