"""The data of a run, opened: the mixture it trains on, and what it is judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets.health import Meter
from datasets.loader import Feed
from datasets.source import Source
from datasets.sources import open_mixture, open_source
from datasets.tars import Tars
from pretrain.build import check_size, feeding
from pretrain.config import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Everything that samples come from."""

    feeds: Sequence[Feed]
    """The mixture that is trained on."""
    objectives: dict[str, tuple[str, ...]]
    """Of each source, the objectives that see its batches."""
    val: Source | None
    """What the model is judged on, where it is not the built-in scenes."""
    meter: Meter
    """What reading costs."""

    def samples_of(self, source: str, shard: str) -> int | None:
        """Samples in a shard of a source; None where there is no such shard."""
        for feed in self.feeds:
            if feed.name == source and isinstance(feed.source, Tars):
                return feed.source.samples_of(shard)
        return None


def open_data(run: Run) -> Data:
    """Open every source, and check that it is enough.

    Raises:
        UserError: data cannot be found or read, or hold not what is asked of them.
    """
    meter = Meter()
    feeds = open_mixture(run.sources, seed=run.seed, augment=run.augment, remote=run.remote, meter=meter)
    shards = run.val not in ("", "scenes")
    val = (
        open_source(run.val, seed=run.seed, split="test", augment=run.augment, remote=run.remote)
        if shards
        else None
    )
    check_size(run, feeds)
    return Data(feeds=feeds, objectives=feeding(run, feeds), val=val, meter=meter)
