"""Pieces of remote shards, through the cache of the node."""

from __future__ import annotations

from threading import Event
from time import monotonic

from datasets.errors import UserError
from datasets.health import Meter
from datasets.remote.cache import Cache, name_of
from datasets.remote.fetch import Remote, fetch, read_whole
from datasets.shards.manifest import Shard
from datasets.shards.sidecar import Table

Piece = tuple[int, int]
"""The bytes [begin, end) of a shard that are fetched and kept together."""
_ATTEMPTS = 3  # to read what another brought, before it is evicted again


class Ranges:
    """Fetches each piece once for all processes that share the cache."""

    def __init__(self, remote: Remote, meter: Meter) -> None:
        """Open the cache; raises UserError if its folder cannot be written."""
        remote.check()
        self._remote = remote
        self._meter = meter
        self._stop = Event()
        self._cache = Cache(remote.place(), limit=int(remote.cache * 2**30))

    def read(self, shard: Shard, piece: Piece, begin: int, end: int) -> bytes:
        """The bytes [begin, end) of a shard, which lie in `piece`; raises as `remote.fetch`."""
        offset, size = begin - piece[0], end - begin
        found = self._cache.read(_name(shard, piece), offset, size, whole=piece[1] - piece[0])
        self._meter.add("cache_miss" if found is None else "cache_hit")
        for _ in range(_ATTEMPTS):
            if found is not None:
                return found
            whole = self._bring(shard, piece)
            if whole is not None:
                return whole[offset : offset + size]
            found = self._cache.read(_name(shard, piece), offset, size, whole=piece[1] - piece[0])
        return self.read_past_cache(shard, begin, end)

    def read_past_cache(self, shard: Shard, begin: int, end: int, waited: float = 0.0) -> bytes:
        """As `read`, from the server."""
        return fetch(
            shard.url,
            begin,
            end,
            remote=self._remote,
            meter=self._meter,
            size=shard.bytes,
            waited=waited,
            stop=self._stop,
        )

    def ensure(self, shard: Shard, piece: Piece) -> None:
        """Have a piece in the cache; raises as `remote.fetch`."""
        if not self._cache.holds(_name(shard, piece), piece[1] - piece[0]):
            self._bring(shard, piece)

    def drop(self, shard: Shard, piece: Piece) -> None:
        """Forget a piece that proved wrong."""
        self._cache.drop(_name(shard, piece))

    def table(self, shard: Shard) -> Table:
        """The sidecar of a shard.

        Raises:
            ShardError: it cannot be fetched.
            UserError: it is damaged.
        """
        name = name_of("sidecar", shard.sidecar, shard.digest)
        try:
            return Table.of(self._sidecar(shard, name), shard.sidecar)
        except UserError:  # what a crash left, or a server's hiccup
            self._cache.drop(name)
            return Table.of(self._sidecar(shard, name), shard.sidecar)

    def stop(self) -> None:
        """End what is being fetched, with a ShardError."""
        self._stop.set()

    def _sidecar(self, shard: Shard, name: str) -> bytes:
        def asked() -> bytes:
            return read_whole(shard.sidecar, remote=self._remote, meter=self._meter, stop=self._stop)

        content = self._cache.bring(name, asked, whole=None, patience=self._remote.deadline / 2)
        if content is None:
            content = self._cache.read(name)
        return asked() if content is None else content

    def _bring(self, shard: Shard, piece: Piece) -> bytes | None:
        start = monotonic()
        return self._cache.bring(
            _name(shard, piece),
            lambda: self.read_past_cache(shard, *piece, waited=monotonic() - start),
            whole=piece[1] - piece[0],
            patience=self._remote.deadline / 2,
        )


def _name(shard: Shard, piece: Piece) -> str:
    return name_of(shard.url, shard.digest, *piece)
