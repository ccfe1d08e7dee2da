"""From the words of a command line to a source."""

from __future__ import annotations

from typing import Literal

from datasets.source import Source
from datasets.views import Augment


def open_source(spec: str, *, seed: int, split: Literal["train", "test"], augment: Augment) -> Source:
    """The source that `spec` names: `scenes`, or comma-separated tar shards, which are pooled.

    Args:
        spec: `scenes`, or what `datasets.tars.Tars` takes.
        seed: of the run; the built-in scenes follow from it.
        split: which of the built-in scenes; shards are the split that their path says.
        augment: random views of shards; scenes are drawn anew instead.

    Raises:
        UserError: shards cannot be found or read.
    """
    if spec == "scenes":
        from datasets.scenes import Scenes

        return Scenes(seed=seed, split=split)
    from datasets.tars import Tars

    return Tars(spec, augment=augment)
