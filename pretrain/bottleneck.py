"""Why data come too slowly, in one sentence that names the way out: from what reading has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from datasets.health import Meter, Running
from datasets.loader import Feed
from datasets.order import RUN, Shuffle, run_length
from datasets.remote.fetch import Remote
from datasets.shards.indexing import cores
from datasets.shards.tars import Tars
from pretrain.config import Run
from pretrain.distributed import Ranks

Reason = Literal["start", "network", "storage", "decoding", "threads"]
_WINDOWS = 2  # that a cache has to hold: the one that is read, and the next, which is being fetched
_BUSY = 0.5  # share of the reading threads' time from which reading and decoding are what they do
_ONE_READ = 0.5  # share of all waiting from which one slow read is the reason
_DOING = {"read": "reading", "decode": "decoding"}


@dataclass(frozen=True, slots=True)
class Stored:
    """A source that lies behind a network."""

    size: int
    """Samples."""
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What reading has to work with."""

    threads: int
    """--loader-threads."""
    cores: int
    """That this rank may use."""
    nodes: float = 1.0
    """Machines: each caches its share of the samples."""
    shuffle: Shuffle = field(default_factory=Shuffle)
    remote: Remote = field(default_factory=Remote)
    stored: Mapping[str, Stored] = field(default_factory=dict[str, Stored])
    """The remote sources, by name."""

    @classmethod
    def of(cls, run: Run, feeds: Sequence[Feed], ranks: Ranks) -> Setting:
        """That of a run in this process."""
        sources = {feed.name: feed.source for feed in feeds}
        return cls(
            threads=run.loader_threads,
            cores=max(cores() // ranks.local, 1),
            nodes=ranks.world / ranks.local,
            shuffle=run.shuffle,
            remote=run.remote,
            stored={
                name: Stored(source.manifest.size, source.manifest.total_bytes)
                for name, source in sources.items()
                if isinstance(source, Tars) and source.remote
            },
        )

    def window_bytes(self, window: int) -> float:
        """What the caches of all machines hold together where nothing is fetched twice within an epoch.

        Runs of RUN samples are fetched whole, also where the order takes apart a small window more finely.
        """
        total = 0.0
        for source in self.stored.values():
            run = run_length(source.size, lanes=self.shuffle.lanes, window=window)
            samples = min(_WINDOWS * window / run * RUN, source.size)
            total += samples * source.bytes / source.size
        return total

    @property
    def needed(self) -> float:
        """Bytes that the cache of a machine should have room for."""
        return self.window_bytes(self.shuffle.window) / self.nodes

    @property
    def room(self) -> float:
        """Bytes that the cache of a machine has."""
        return self.remote.cache * 2**30


def cache_warnings(setting: Setting) -> list[str]:
    """Said at the start where the cache is too small for the shuffle window."""
    if setting.needed <= setting.room:
        return []
    lanes, window = setting.shuffle.lanes, setting.shuffle.window
    while window >= lanes and setting.window_bytes(window) / setting.nodes > setting.room:
        window //= 2
    whole = run_length(window, lanes=lanes, window=window) == RUN  # else a part of what is fetched is used
    return [
        f"warning: windows of {setting.shuffle.window:,} samples of remote data take "
        f"{_amount(setting.needed)} of cache on each machine and --remote.cache has {_amount(setting.room)}, "
        "so that much is fetched more than once: raise it"
        + (f", or begin a run with --shuffle.window {window}" if whole else "")
    ]


def why_slow(sums: Mapping[str, float], setting: Setting, *, fetched: float | None) -> tuple[Reason, str]:
    """What holds training back.

    Args:
        sums: of the rank that waits longest, over the same stretch of time: `seconds` and how many of them it
            `waited`; and as `datasets.health` names them, of reading, decoding and fetching.
        setting: what reading has to work with.
        fetched: bytes that all ranks have fetched since the start, while the first window is being read;
            None afterwards.
    """
    reading, decoding = sums["read_seconds"], sums["decode_seconds"]
    if reading > decoding or sums["read_max"] > _ONE_READ * sums["waited"]:
        if not sums["cache_miss"]:
            return "storage", _storage(sums)
        if fetched is not None:
            return "start", (
                f"the first shuffle window is being fetched, {_amount(fetched)} so far of at most "
                f"{_amount(setting.needed * setting.nodes)}; {_fetching(sums)}; this passes when it is here"
            )
        return "network", _network(sums, setting)
    more = (
        f"raise --loader-threads, now {setting.threads}, towards the {setting.cores} cores of this process"
        if setting.threads < setting.cores
        else f"give this process more than {setting.cores} cores"
    )
    if decoding + reading < _BUSY * setting.threads * sums["seconds"]:
        return "threads", f"the reading threads make samples and batches too slowly: {more}"
    each = 1000 * decoding / max(sums["decode_count"], 1)
    return "decoding", (
        f"decoding, {each:.0f} ms an image, keeps all reading threads busy: {more}, or store smaller images"
    )


def why_late(seconds: float, meter: Meter, *, fetched: float, setting: Setting) -> str:
    """A step does not come: what is under way meanwhile.

    Args:
        seconds: that it has been waited for.
        meter: of all reading.
        fetched: bytes that this process has fetched since the start.
        setting: what reading has to work with.
    """
    running = meter.running()
    said = [f"{_DOING[each.name]} {_taking(each)}" for each in running if each.name in _DOING][:1]
    fetches = [each for each in running if each.name == "fetch"]
    if fetches:
        said.append(f"fetches under way: {len(fetches)}, the longest of {_taking(fetches[0])}")
    retries, reason = meter.told("retry")
    if retries:
        said.append(f"tried again: {retries:.0f}{f', the last time because {reason}' if reason else ''}")
    if setting.stored:
        said.append(f"{_amount(fetched)} fetched since the start")
    if not running:
        said.append(f"no read is under way: --loader-threads {setting.threads} make samples and batches")
    return f"warning: no data for the next step for {seconds:.0f} s: {'; '.join(said)}"


def _storage(sums: Mapping[str, float]) -> str:
    return (
        f"a read from storage takes {_mean_ms(sums, 'read')} ms on average and "
        f"{1000 * sums['read_max']:.0f} ms at most: copy the shards to a faster disk, or raise "
        "--loader-threads to wait for several at once"
    )


def _network(sums: Mapping[str, float], setting: Setting) -> str:
    if setting.needed > setting.room:
        out = f"raise --remote.cache to {setting.needed / 2**30:.1f}, which the shuffle window takes"
    else:
        out = f"raise --remote.connections, now {setting.remote.connections}, or copy the shards nearer"
    return f"{_fetching(sums)}: {out}"


def _fetching(sums: Mapping[str, float]) -> str:
    speed = sums["fetch_bytes"] / 2**20 / sums["seconds"]
    hits = sums["cache_hit"] / (sums["cache_hit"] + sums["cache_miss"])
    retries = f", {sums['retry']:.0f} were tried again" if sums["retry"] else ""
    return (
        f"fetching brings {speed:.1f} MiB/s, a range takes {_mean_ms(sums, 'fetch')} ms on average{retries}, "
        f"and {hits:.0%} of the reads find their bytes in the cache"
    )


def _mean_ms(sums: Mapping[str, float], name: str) -> str:
    return f"{1000 * sums[f'{name}_seconds'] / max(sums[f'{name}_count'], 1):.0f}"


def _taking(running: Running) -> str:
    return f"{running.what} for {running.seconds:.0f} s"


def _amount(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
