"""What is known about a shard, in a file of its own: where each sample's parts lie, and their checksums.

Layout, little endian: a header of 68 bytes (`_HEAD`); the ends of the blocks, u32, counted from their first
byte; then the blocks, of BLOCK samples each and the last of fewer. A block is its CRC-32, then columns over
its samples: for each part that occurs in the shard 16 bytes (offset u64, size u32, CRC-32 u32; an offset of
all ones: not there), key hashes u64, ends of keys u32; the number of faults u16, and of each its sample u8
and its end u32; then keys and faults, UTF-8. About 70 bytes a sample.

Opening reads header and ends, and a row its block: a window of shuffled samples touches thousands of
shards, of each a run of neighbours. Header and ends, and each block, carry a CRC-32, and a place is tested
against the shard's size, so that a torn or hostile sidecar is an error and never a wild read. It is read, not
mapped: a map of a file that is replaced on a network file system kills the process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from datasets.atomic import replace
from datasets.errors import UserError
from datasets.shards.grouping import Samples
from datasets.shards.scan import Members, Scan

MAGIC = b"medleyIX"
BLOCK = 64
"""Samples of a block: what is read, and proved, together."""
TOO_MANY = (errno.EMFILE, errno.ENFILE)
"""What the system says where no more files can be open."""
_VERSION = 2
_KEPT = 16  # blocks: a small shard's are all at hand, and a large one's are few
_HEAD = Struct("<8s I I Q Q 16s Q Q I")  # see Head; the last: CRC-32 of header and ends
_PLACE = Struct("<QII")
_FAULT = Struct("<BI")
_COLUMN = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")])
_NOWHERE = 2**64 - 1


class Place(NamedTuple):
    """Where a member's bytes lie in its shard."""

    offset: int
    size: int
    crc: int
    """zlib.crc32 of the bytes."""


class Row(NamedTuple):
    """One sample of a shard; what it lacks is None."""

    key: str
    """Printable, unique within the shard."""
    image: Place | None
    """KEY.jpg, .jpeg, .png or .webp."""
    text: Place | None
    """KEY.txt."""
    record: Place | None
    """KEY.json."""
    number: Place | None
    """KEY.cls."""
    fault: str
    """Why it cannot be used whatever is asked of it (a part twice, a link, ...), or nothing."""

    @property
    def places(self) -> list[Place]:
        """Of the parts it has."""
        return [place for place in (self.image, self.text, self.record, self.number) if place is not None]


@dataclass(frozen=True, slots=True)
class Head:
    """The header: what can be known of a shard without its samples."""

    parts: int
    """One bit for each part that occurs, image first."""
    bytes: int
    mtime_ns: int
    digest: str
    samples: int
    body: int
    """Bytes of all blocks."""

    @property
    def blocks(self) -> int:
        """How many there are."""
        return -(-self.samples // BLOCK)

    @property
    def first(self) -> int:
        """Where the first block begins."""
        return _HEAD.size + 4 * self.blocks

    @classmethod
    def read(cls, path: Path) -> Head:
        """The header of a sidecar file.

        Raises:
            UserError: it is no sidecar, damaged, cut off or of another version.
        """
        return Table.open(path).head


_AGAIN = "index its shard again with `python -m datasets.index`"


class Table:
    """The samples of a shard. Opening it and reading a row cost some 20 us each, however many there are."""

    def __init__(self, read: Callable[[int, int], bytes], length: int, name: str) -> None:
        """Read the header.

        Args:
            read: gives `size` bytes of the sidecar from `offset` on, from any thread.
            length: bytes of the sidecar.
            name: what to call it in errors.

        Raises:
            UserError: it is no sidecar, of another version, or damaged.
        """
        self._read, self._name = read, name
        data = read(0, _HEAD.size)
        if len(data) < _HEAD.size or data[:8] != MAGIC:
            raise UserError(f"{name} is no sidecar of a shard; {_AGAIN}")
        _, version, parts, size, mtime, digest, samples, body, own = _HEAD.unpack(data)
        if version != _VERSION:
            raise UserError(f"{name} has version {version}, not {_VERSION}; {_AGAIN}")
        self.head = head = Head(parts, size, mtime, digest.hex(), samples, body)
        if parts > 15 or head.first + body != length:
            raise self._damaged()
        ends = read(_HEAD.size, 4 * head.blocks)
        if crc32(ends, crc32(data[:-4])) != own:
            raise self._damaged()
        self._ends = np.frombuffer(ends, "<u4")
        if not _rising(self._ends, body):
            raise self._damaged()
        self._blocks: dict[int, bytes] = {}

    @classmethod
    def open(cls, path: Path) -> Table:
        """Open a sidecar file; raises UserError if it cannot be, as the constructor does."""
        try:
            file = path.open("rb", buffering=0)
            return cls(lambda at, size: os.pread(file.fileno(), size, at), file.seek(0, 2), str(path))
        except OSError as error:
            way = "allow more with `ulimit -n`" if error.errno in TOO_MANY else _AGAIN
            raise UserError(f"cannot read {path}: {error.strerror}; {way}") from error

    @classmethod
    def of(cls, data: bytes, name: str) -> Table:
        """The table that a whole sidecar in memory is; raises as the constructor does."""
        return cls(lambda at, size: data[at : at + size], len(data), name)

    @property
    def bytes(self) -> int:
        """Of the shard."""
        return self.head.bytes

    @property
    def mtime_ns(self) -> int:
        """When a local shard was last changed before it was indexed; 0 for a remote one."""
        return self.head.mtime_ns

    @property
    def digest(self) -> str:
        """Hex, 128 bit: names, offsets, sizes and checksums of all members, and the shard's size."""
        return self.head.digest

    def __len__(self) -> int:
        return self.head.samples

    def __iter__(self) -> Iterator[Row]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Row:
        """A sample; raises UserError where the sidecar is damaged."""
        if not 0 <= row < self.head.samples:
            raise IndexError(row)
        number, place = divmod(row, BLOCK)
        data, samples = self._block(number), self._samples(number)
        at, parts = 4, list[Place | None]()
        for part in range(4):
            here = self.head.parts >> part & 1
            parts.append(self._place(data, at + place * _PLACE.size) if here else None)
            at += here * samples * _PLACE.size
        at += samples * 8  # hashes
        begin = _number(data, at + 4 * place - 4) if place else 0
        end, all_keys = _number(data, at + 4 * place), _number(data, at + 4 * samples - 4)
        at += samples * 4
        faults = _number(data, at, 2)
        keys = at + 2 + faults * _FAULT.size
        if not begin <= end <= all_keys <= len(data) - keys:
            raise self._damaged()
        key = data[keys + begin : keys + end].decode("utf-8", "replace")
        image, text, record, label = parts
        fault = self._fault(data, at + 2, faults, keys + all_keys, place) if faults else ""
        return Row(key, image, text, record, label, fault)

    def extent(self, first: int, last: int) -> tuple[int, int]:
        """The bytes [begin, end) of the shard that hold all parts of rows [first, last); (0, 0) if none."""
        places = [place for row in range(first, last) for place in self[row].places]
        if not places:
            return 0, 0
        return min(place.offset for place in places), max(place.offset + place.size for place in places)

    def key_hashes(self) -> NDArray[np.uint64]:
        """(samples,) the first 8 bytes of BLAKE2b of each key."""
        hashes = [np.empty(0, "<u8")]
        for number in range(self.head.blocks):
            samples = self._samples(number)
            at = 4 + self.head.parts.bit_count() * samples * _PLACE.size
            data = self._block(number)
            if at + samples * 8 > len(data):
                raise self._damaged()
            hashes.append(np.frombuffer(data, "<u8", samples, at))
        return np.concatenate(hashes)

    def _samples(self, number: int) -> int:
        """Of a block."""
        return min(BLOCK, self.head.samples - number * BLOCK)

    def _block(self, number: int) -> bytes:
        """The bytes of a block, proved by its checksum."""
        kept = self._blocks.get(number)
        if kept is not None:
            return kept
        begin = int(self._ends[number - 1]) if number else 0
        data = self._read(self.head.first + begin, int(self._ends[number]) - begin)
        if len(data) < 4 or crc32(data[4:]) != int.from_bytes(data[:4], "little"):
            raise self._damaged()
        if len(self._blocks) >= _KEPT:
            self._blocks = {}
        self._blocks[number] = data
        return data

    def _place(self, data: bytes, at: int) -> Place | None:
        if at + _PLACE.size > len(data):
            raise self._damaged()
        offset, size, crc = _PLACE.unpack_from(data, at)
        if offset == _NOWHERE:
            return None
        if size > self.head.bytes or offset > self.head.bytes - size:
            raise self._damaged()
        return Place(offset, size, crc)

    def _fault(self, data: bytes, at: int, faults: int, texts: int, place: int) -> str:
        """Why the sample at a place of a block cannot be used, or nothing."""
        begin = 0
        for number in range(faults):
            row, end = _FAULT.unpack_from(data, at + number * _FAULT.size)
            if not begin <= end <= len(data) - texts:
                raise self._damaged()
            if row == place:
                return data[texts + begin : texts + end].decode("utf-8", "replace")
            begin = end
        return ""

    def _damaged(self) -> UserError:
        return UserError(f"{self._name} is damaged; {_AGAIN}")


def write(path: Path, scan: Scan, samples: Samples, *, mtime_ns: int) -> Head:
    """Write the sidecar of a shard, all or nothing; returns its header."""
    columns, parts = _columns(scan.members, samples)
    keys = [key.encode() for key in samples.keys]
    blocks: list[bytes] = []
    for first in range(0, len(keys), BLOCK):
        rows = range(first, min(first + BLOCK, len(keys)))
        some = [keys[row] for row in rows]
        faulty = [row for row in rows if row in samples.faults]
        faults = [samples.faults[row].reason.encode() for row in faulty]
        listed = [
            _FAULT.pack(row - first, end)
            for row, end in zip(faulty, accumulate(map(len, faults)), strict=True)
        ]
        hashes = [blake2b(key, digest_size=8).digest() for key in some]
        places = [column[rows.start : rows.stop].tobytes() for column in columns]
        count = len(faults).to_bytes(2, "little")
        block = b"".join([*places, *hashes, _ends(some), count, *listed, *some, *faults])
        blocks.append(crc32(block).to_bytes(4, "little") + block)
    sizes = (len(keys), sum(map(len, blocks)))
    head = Head(parts, scan.bytes, mtime_ns, digest(scan.members, scan.bytes), *sizes)
    fixed = (MAGIC, _VERSION, parts, head.bytes, mtime_ns, bytes.fromhex(head.digest), *sizes, 0)
    start, ends = _HEAD.pack(*fixed)[:-4], _ends(blocks)
    replace(path, start + crc32(ends, crc32(start)).to_bytes(4, "little") + ends + b"".join(blocks))
    return head


def digest(members: Members, size: int) -> str:
    """What tells one shard's content from another's, wherever it lies: hex, 128 bit."""
    names = [name.encode("utf-8", "surrogateescape") for name in members.names]
    hashed = blake2b(size.to_bytes(8, "little"), digest_size=16)
    for column in (members.offsets, members.sizes, members.crcs, [len(name) for name in names]):
        hashed.update(np.array(column, "<u8").tobytes())
    hashed.update(b"".join(names))
    return hashed.hexdigest()


def _columns(members: Members, samples: Samples) -> tuple[list[NDArray[Any]], int]:
    """A column of places for each part that occurs, and the bits that say which."""
    whole = np.empty(len(members) + 1, _COLUMN)
    sizes = np.array([*members.sizes, 0], "<u8")
    whole["offset"], whole["crc"] = [*members.offsets, _NOWHERE], [*members.crcs, 0]
    whole["size"] = np.minimum(sizes, 2**32 - 1)  # what is larger is no part of a sample
    columns: list[NDArray[Any]] = []
    bits = 0
    for part, numbers in enumerate(samples.parts):
        chosen = whole[np.array(numbers, np.int64)]  # -1, not there, is the last
        if len(chosen) and int(chosen["offset"].min()) != _NOWHERE:
            columns.append(chosen)
            bits |= 1 << part
    return columns, bits


def _number(data: bytes, at: int, size: int = 4) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _ends(texts: Sequence[bytes]) -> bytes:
    return np.cumsum([len(text) for text in texts], dtype="<u4").tobytes()


def _rising(ends: NDArray[Any], last: int) -> bool:
    """Whether these are the ends of consecutive pieces that make up `last` bytes."""
    if not len(ends):
        return last == 0
    return bool(np.all(ends[1:] >= ends[:-1])) and int(ends[-1]) == last
