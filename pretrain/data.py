"""The data of a run, opened: the mixture it trains on, and what it is judged on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datasets.health import Meter
from datasets.loader import Feed
from datasets.shards.tars import Tars
from datasets.source import Source
from datasets.sources import open_mixture, open_source
from datasets.weights import weight_at
from pretrain.build import check_size, feeding, feeds_in
from pretrain.config import Run
from pretrain.curriculum import Stretch


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Everything that samples come from."""

    feeds: Sequence[Feed]
    """The mixture that is trained on."""
    objectives: dict[str, dict[str, tuple[str, ...]]]
    """Of each stage and source of it, the objectives that see its batches."""
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

    def close(self) -> None:
        """Close what is open; nothing can be read afterwards."""
        for source in (*(feed.source for feed in self.feeds), self.val):
            if isinstance(source, Tars):
                source.close()

    def described(self, stretch: Stretch) -> list[str]:
        """A line for each source: its share as the stretch begins, what it holds, what it feeds."""
        feeds = feeds_in(stretch, self.feeds)
        weights = {feed.name: weight_at(feed.weight, stretch.first) for feed in feeds}
        lines: list[str] = []
        for feed in feeds:
            share, size = weights[feed.name] / sum(weights.values()), feed.source.size
            many = "endless" if size is None else f"{size:,} samples"
            fed = ", ".join(self.objectives[stretch.name][feed.name])
            lines.append(
                f"  {feed.name}: {share:.0%} {feed.holding.holds} of {feed.source.name} ({many}) for {fed}"
            )
        return lines


def open_data(run: Run, *, say: Callable[[str], None] | None = None) -> Data:
    """Open every source, and check that it is enough.

    Args:
        run: which data.
        say: told when shards have to be indexed first.

    Raises:
        UserError: data cannot be found or read, or hold not what is asked of them.
    """
    meter = Meter()
    feeds = open_mixture(run.sources, seed=run.seed, remote=run.remote, meter=meter, say=say)
    shards = run.val not in ("", "scenes")
    val = open_source(run.val, seed=run.seed, split="test", remote=run.remote, say=say) if shards else None
    check_size(run, feeds)
    objectives = {stage: feeding(run, feeds, stage) for stage in run.stages}
    return Data(feeds=feeds, objectives=objectives, val=val, meter=meter)
