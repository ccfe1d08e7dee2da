"""Which bytes of a shard are fetched together: those of the neighbours that the order reads together."""

from __future__ import annotations

from collections.abc import Iterator

from datasets.order import RUN
from datasets.remote.fetch import PIECE
from datasets.shards.sidecar import Place, Table


class Runs:
    """The aligned runs of RUN samples that a shard has a part in, numbered over all shards of the manifest.

    A run is fetched as one piece, the extent of its members. One that is longer than PIECE, of huge samples
    or of a shard with all images before all texts, is fetched in pieces that its neighbours share.
    """

    def __init__(self, table: Table, first: int) -> None:
        """Take the table of a shard and the index of its first sample."""
        self._table = table
        self._first = first
        self._runs = range(first // RUN, (first + len(table) - 1) // RUN + 1)
        self._extents: dict[int, tuple[int, int]] = {}

    def pieces(self, run: int) -> Iterator[tuple[int, int]]:
        """The byte ranges [begin, end) to fetch for a run."""
        begin, end = self._extent(run)
        if end - begin <= PIECE:
            if end > begin:
                yield begin, end
            return
        for at in range(begin // PIECE * PIECE, end, PIECE):
            yield at, min(at + PIECE, self._table.bytes)

    def holding(self, place: Place) -> list[tuple[int, int]]:
        """The pieces, in order, that the bytes of a place lie in."""
        end = place.offset + place.size
        run = self._last_from(place.offset)
        begins, ends = self._extent(run)
        if not begins <= place.offset <= end <= ends:  # its run begins earlier, and others lie within
            return [(place.offset, end)]
        return [piece for piece in self.pieces(run) if piece[0] < end and place.offset < piece[1]]

    def _last_from(self, offset: int) -> int:
        """The last run that begins at or before a byte: in a shard they begin one after the other."""
        low, high = 0, len(self._runs) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._extent(self._runs[middle])[0] <= offset:
                low = middle
            else:
                high = middle - 1
        return self._runs[low]

    def _extent(self, run: int) -> tuple[int, int]:
        """Of the members of a run; nothing, where the next one begins, if it has none."""
        found = self._extents.get(run)
        if found is None:
            found, at = self._members(run), run
            while found == (0, 0):  # in place of a begin that is out of order
                at += 1
                begin = self._members(at)[0] if at in self._runs else self._table.bytes
                found = begin, begin
            self._extents[run] = found
        return found

    def _members(self, run: int) -> tuple[int, int]:
        first = max(run * RUN - self._first, 0)
        last = min((run + 1) * RUN - self._first, len(self._table))
        return self._table.extent(first, last)
