"""The members of all shards of a manifest, local or remote, from any thread, each proved by its checksum.

Trouble is told apart: what may pass is tried again, a shard that is gone or is not the one that was indexed
stops the reader by name, and a member whose bytes are wrong is its sample's fault alone.
"""

from __future__ import annotations

import errno
import os
import time
from functools import lru_cache
from pathlib import Path
from threading import Lock
from zlib import crc32

from datasets.errors import ContentError, ShardError, UserError
from datasets.health import Meter
from datasets.order import RUN
from datasets.remote.ahead import Ahead
from datasets.remote.fetch import Remote, is_remote
from datasets.remote.ranges import Ranges
from datasets.remote.runs import Runs
from datasets.shards.descriptors import Descriptors, allowed
from datasets.shards.manifest import Manifest, Shard
from datasets.shards.sidecar import TOO_MANY, Place, Table

_TABLES = 128  # sidecars that are kept open
_WAITING = 4096  # runs queued for fetching
_PAUSES = (0.0, 0.1, 1.0)  # seconds before a local read is tried again: a file server may be restarted
_AGAIN = "put back what it was, or index it again with `python -m datasets.index`"
_SPOT_CHECKS = 8  # samples that tell a damaged shard from another one


class Store:
    """Reads members by shard number and place."""

    def __init__(
        self, manifest: Manifest, *, remote: Remote | None = None, meter: Meter | None = None
    ) -> None:
        """Nothing is opened yet.

        Args:
            manifest: which shards there are.
            remote: how remote ones are read.
            meter: is told how reading goes: `read` and `fetch` (timed), `bytes` of members, `fetch_bytes`,
                `cache_hit`, `cache_miss`, `retry`.
        """
        self.manifest = manifest
        self._remote = remote or Remote()
        self._meter = meter or Meter()
        self._shard = lru_cache(1024)(manifest.__getitem__)
        self._runs = lru_cache(min(allowed(), _TABLES))(self._open_table)
        self._files = Descriptors(self._open, limit=allowed())
        self._lock = Lock()
        self._ranges: Ranges | None = None
        self._ahead = Ahead(self._fetch_run, threads=self._remote.connections, limit=_WAITING)
        self._sound: set[int] = set()

    def table(self, number: int) -> Table:
        """The samples of a shard.

        Raises:
            UserError: its sidecar is damaged.
            ShardError: it is gone, or of another content than the manifest says.
        """
        return self._runs(number)[0]

    def read(self, number: int, place: Place) -> bytes:
        """The bytes of a member.

        Raises:
            ContentError: its bytes are not those that were indexed, also when read again.
            ShardError: its shard is gone, has changed, or does not answer.
        """
        with self._meter.timed("read", self._shard(number).label):
            data = self._bytes(number, place)
            if crc32(data) != place.crc:
                self._forget(number, place)
                data = self._bytes(number, place)
                if crc32(data) != place.crc:
                    raise self._wrong(number, place)
        self._meter.add("bytes", len(data))
        return data

    def prefetch(self, number: int, first: int, last: int) -> None:
        """Have the runs that rows [first, last) of a remote shard lie in fetched in the background.

        Never raises and never waits: where this fails, the reader meets the same and says so. More than a few
        thousand waiting runs are left to the reader.
        """
        if last <= first or not is_remote(self._shard(number).url):
            return
        start = self.manifest.first(number)
        for run in range((start + first) // RUN, (start + last - 1) // RUN + 1):
            self._ahead.put((number, run))

    def close(self) -> None:
        """Close all files, and end what is being fetched: a reader that waits for it gets a ShardError."""
        with self._lock:
            if self._ranges is not None:
                self._ranges.stop()
        self._ahead.close(patience=1.0)
        self._files.close()
        self._runs.cache_clear()  # each holds its sidecar open

    def _open_table(self, number: int) -> tuple[Table, Runs]:
        shard = self._shard(number)
        table = self._fetcher().table(shard) if is_remote(shard.sidecar) else self._sidecar(shard)
        if (table.digest, table.bytes, len(table)) != (shard.digest, shard.bytes, shard.samples):
            raise ShardError(f"{shard.sidecar} is not of the shard that the manifest names; {_AGAIN}")
        return table, Runs(table, self.manifest.first(number))

    def _sidecar(self, shard: Shard) -> Table:
        try:
            return Table.open(Path(shard.sidecar))
        except UserError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in TOO_MANY:
                raise
        self._files.close()  # somebody else uses many
        self._runs.cache_clear()
        return Table.open(Path(shard.sidecar))

    def _bytes(self, number: int, place: Place) -> bytes:
        shard = self._shard(number)
        if not is_remote(shard.url):
            return self._local(number, shard, place)
        ranges = self._fetcher()
        end = place.offset + place.size
        parts = [
            ranges.read(shard, piece, max(place.offset, piece[0]), min(end, piece[1]))
            for piece in self._runs(number)[1].holding(place)
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _forget(self, number: int, place: Place) -> None:
        """Read what this place lies in anew from where it comes."""
        shard = self._shard(number)
        if is_remote(shard.url):
            for piece in self._runs(number)[1].holding(place):
                self._fetcher().drop(shard, piece)
        else:
            self._files.drop(number)

    def _local(self, number: int, shard: Shard, place: Place) -> bytes:
        reason = ""
        for pause in _PAUSES:
            if pause:
                self._meter.add("retry", reason=reason)
                time.sleep(pause)
            try:
                data = self._files.read(number, place.size, place.offset)
                if len(data) == place.size:
                    return data
                reason = "it ends too early"
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR):
                    raise ShardError(f"{shard.url} cannot be read ({error.strerror}); {_AGAIN}") from error
                reason = str(error.strerror)
            self._files.drop(number)
        raise ShardError(f"{shard.url} cannot be read at byte {place.offset} ({reason}); {_AGAIN}")

    def _open(self, number: int) -> int:
        shard = self._shard(number)
        descriptor = os.open(shard.url, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(descriptor).st_size
        if size != shard.bytes:
            os.close(descriptor)
            raise _changed(shard, f"it has {size} bytes, not {shard.bytes}")
        return descriptor

    def _wrong(self, number: int, place: Place) -> ContentError | ShardError:
        """One member, or the shard: another file of its name and size has nothing of what was indexed."""
        shard = self._shard(number)
        if number not in self._sound:
            if not self._spot_check(number, shard):
                return _changed(shard, "it holds other bytes")
            self._sound.add(number)
        return ContentError(
            f"{place.size} bytes at {place.offset} of {shard.label} are not those indexed",
            kind="checksum",
        )

    def _spot_check(self, number: int, shard: Shard) -> bool:
        """Whether any of a few members, from all over the shard, is what was indexed."""
        table = self._runs(number)[0]
        for row in range(0, len(table), -(-len(table) // _SPOT_CHECKS)):
            sample = table[row]
            for place in filter(None, (sample.image, sample.text, sample.record, sample.number)):
                if is_remote(shard.url):
                    data = self._fetcher().read_past_cache(shard, place.offset, place.offset + place.size)
                else:
                    data = self._local(number, shard, place)
                if place.size and crc32(data) == place.crc:
                    return True
        return False

    def _fetcher(self) -> Ranges:
        with self._lock:
            if self._ranges is None:
                self._ranges = Ranges(self._remote, self._meter)
            return self._ranges

    def _fetch_run(self, item: tuple[int, int]) -> None:
        number, run = item
        shard = self._shard(number)
        try:
            for piece in self._runs(number)[1].pieces(run):
                self._fetcher().ensure(shard, piece)
        except (ValueError, OSError):  # the reader of this run will say so
            self._meter.add("ahead_failed")


def _changed(shard: Shard, how: str) -> ShardError:
    return ShardError(f"{shard.url} has changed since it was indexed: {how}; {_AGAIN}")
