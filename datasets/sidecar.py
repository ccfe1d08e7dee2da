"""What is known about a shard, in a file of its own: where each sample's parts lie, and their checksums.

Layout, little endian: a header of 88 bytes (`_HEAD`), then the body, columns over the samples: for each part
that occurs in the shard 16 bytes (offset u64, size u32, CRC-32 u32; an offset of all ones: not there), key
hashes u64, ends of the keys u32, keys; then the faults: rows u32, ends u32, texts (UTF-8). About 65 bytes a
sample. Header and body each carry a CRC-32, and every place is tested against the shard's size on opening,
so that a torn or hostile sidecar is an error and never a wild read. It is read whole, not mapped: it is
small, and a map of a file that is replaced on a network file system kills the process.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from datasets.atomic import replace
from datasets.errors import UserError
from datasets.grouping import Samples
from datasets.scan import Members, Scan

MAGIC = b"medleyIX"
_VERSION = 1
_HEAD = Struct("<8s I I Q Q 16s Q Q Q Q I I")  # see Head; the last two are the checksums of body and header
_PLACE = Struct("<QII")
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
    """The header: what can be known of a shard by reading 88 bytes."""

    parts: int
    """One bit for each part that occurs, image first."""
    bytes: int
    mtime_ns: int
    digest: str
    samples: int
    keys: int
    """Bytes of all keys."""
    faults: int
    """How many samples cannot be used."""
    texts: int
    """Bytes of all faults' reasons."""
    checksum: int
    """CRC-32 of the body."""

    @property
    def body(self) -> int:
        """Bytes that follow the header."""
        columns = self.parts.bit_count() * _PLACE.size + 8 + 4
        return self.samples * columns + self.keys + self.faults * 8 + self.texts

    @classmethod
    def read(cls, path: Path) -> Head:
        """The header of a sidecar file.

        Raises:
            UserError: it is no sidecar, damaged, cut off or of another version.
        """
        try:
            with path.open("rb", buffering=0) as file:
                return cls.parse(file.read(_HEAD.size), file.seek(0, 2), str(path))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; {_AGAIN}") from error

    @classmethod
    def parse(cls, data: bytes, length: int, name: str) -> Head:
        """The header in `data`, of a sidecar of `length` bytes in all; raises as `read` does."""
        if len(data) < _HEAD.size or data[:8] != MAGIC:
            raise UserError(f"{name} is no sidecar of a shard; {_AGAIN}")
        _, version, parts, size, mtime, digest, *rest = _HEAD.unpack_from(data)
        if version != _VERSION:
            raise UserError(f"{name} has version {version}, not {_VERSION}; {_AGAIN}")
        samples, keys, faults, texts, checksum, own = rest
        head = cls(parts, size, mtime, digest.hex(), samples, keys, faults, texts, checksum)
        if crc32(data[: _HEAD.size - 4]) != own or parts > 15 or head.body != length - _HEAD.size:
            raise UserError(f"{name} is damaged; {_AGAIN}")
        return head


_AGAIN = "index its shard again with `python -m datasets.index`"


class Table:
    """The samples of a shard. Opening it reads the sidecar (0.7 MB for 10,000 samples); a row takes 2 us."""

    def __init__(self, data: bytes, name: str) -> None:
        """Take a sidecar's bytes.

        Args:
            data: the whole file.
            name: what to call it in errors.

        Raises:
            UserError: it is no sidecar, of another version, or damaged.
        """
        self._head = head = Head.parse(data, len(data), name)
        self._data = data
        view = memoryview(data)[_HEAD.size :]
        self._columns: list[int | None] = []
        at = _HEAD.size
        for part in range(4):
            here = head.parts >> part & 1
            self._columns.append(at if here else None)
            at += here * head.samples * _PLACE.size
        self._hashes, at = at, at + head.samples * 8
        ends_of_keys = np.frombuffer(data, "<u4", head.samples, at)
        self._keys = at + head.samples * 4
        at = self._keys + head.keys
        rows = np.frombuffer(data, "<u4", head.faults, at)
        ends = np.frombuffer(data, "<u4", head.faults, at + 4 * head.faults)
        self._texts = at + 8 * head.faults
        rising = _rising(ends_of_keys, head.keys) and _rising(ends, head.texts)
        if crc32(view) != head.checksum or not rising or not self._within(rows):
            raise UserError(f"{name} is damaged; {_AGAIN}")
        self._ends = array("I", ends_of_keys.astype("=u4").tobytes())
        self._faults = {row: number for number, row in enumerate(rows.tolist())}
        self._reasons = ends

    @classmethod
    def open(cls, path: Path) -> Table:
        """Read a sidecar file; raises UserError if it cannot be, as the constructor does."""
        try:
            return cls(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; {_AGAIN}") from error

    @property
    def bytes(self) -> int:
        """Of the shard."""
        return self._head.bytes

    @property
    def mtime_ns(self) -> int:
        """When a local shard was last changed before it was indexed; 0 for a remote one."""
        return self._head.mtime_ns

    @property
    def digest(self) -> str:
        """Hex, 128 bit: names, offsets, sizes and checksums of all members, and the shard's size."""
        return self._head.digest

    def __len__(self) -> int:
        return self._head.samples

    def __iter__(self) -> Iterator[Row]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < self._head.samples:
            raise IndexError(row)
        begin, end = self._ends[row - 1] if row else 0, self._ends[row]
        key = self._data[self._keys + begin : self._keys + end].decode("utf-8", "replace")
        image, text, record, number = self._columns
        return Row(
            key,
            self._place(image, row),
            self._place(text, row),
            self._place(record, row),
            self._place(number, row),
            self._fault(row) if row in self._faults else "",
        )

    def extent(self, first: int, last: int) -> tuple[int, int]:
        """The bytes [begin, end) of the shard that hold all parts of rows [first, last); (0, 0) if none."""
        begins: list[int] = []
        ends: list[int] = []
        for places in self._places():
            some = places[first:last]
            some = some[some["offset"] != _NOWHERE]
            if len(some):
                begins.append(int(some["offset"].min()))
                ends.append(int((some["offset"] + some["size"]).max()))
        return (min(begins), max(ends)) if begins else (0, 0)

    def key_hashes(self) -> NDArray[np.uint64]:
        """(samples,) the first 8 bytes of BLAKE2b of each key."""
        return np.frombuffer(self._data, "<u8", self._head.samples, self._hashes)

    def _place(self, column: int | None, row: int) -> Place | None:
        if column is None:
            return None
        offset, size, crc = _PLACE.unpack_from(self._data, column + row * _PLACE.size)
        return None if offset == _NOWHERE else Place(offset, size, crc)

    def _fault(self, row: int) -> str:
        number = self._faults[row]
        begin = self._texts + (int(self._reasons[number - 1]) if number else 0)
        return self._data[begin : self._texts + int(self._reasons[number])].decode("utf-8", "replace")

    def _places(self) -> list[NDArray[Any]]:
        """The columns of the parts that occur."""
        columns = [column for column in self._columns if column is not None]
        return [np.frombuffer(self._data, _COLUMN, self._head.samples, column) for column in columns]

    def _within(self, rows: NDArray[Any]) -> bool:
        """Whether faults are those of samples here, and all places in the shard."""
        head = self._head
        if len(rows) and int(rows.max()) >= head.samples:
            return False
        for places in self._places():
            some = places[places["offset"] != _NOWHERE]
            if not np.all((some["offset"] <= head.bytes) & (some["size"] <= head.bytes - some["offset"])):
                return False
        return True


def write(path: Path, scan: Scan, samples: Samples, *, mtime_ns: int) -> Head:
    """Write the sidecar of a shard, all or nothing; returns its header."""
    members = scan.members
    body, parts = _columns(members, samples)
    keys = [key.encode() for key in samples.keys]
    hashes = b"".join(blake2b(key, digest_size=8).digest() for key in keys)
    rows = sorted(samples.faults)
    texts = [samples.faults[row].reason.encode() for row in rows]
    body += [hashes, _ends(keys), *keys, np.array(rows, "<u4").tobytes(), _ends(texts), *texts]
    content = b"".join(body)
    head = Head(
        parts=parts,
        bytes=scan.bytes,
        mtime_ns=mtime_ns,
        digest=digest(members, scan.bytes),
        samples=len(keys),
        keys=sum(map(len, keys)),
        faults=len(rows),
        texts=sum(map(len, texts)),
        checksum=crc32(content),
    )
    sizes = (head.samples, head.keys, head.faults, head.texts, head.checksum)
    start = _HEAD.pack(MAGIC, _VERSION, parts, scan.bytes, mtime_ns, bytes.fromhex(head.digest), *sizes, 0)[
        :-4
    ]
    replace(path, start + crc32(start).to_bytes(4, "little") + content)
    return head


def digest(members: Members, size: int) -> str:
    """What tells one shard's content from another's, wherever it lies: hex, 128 bit."""
    names = [name.encode("utf-8", "surrogateescape") for name in members.names]
    hashed = blake2b(size.to_bytes(8, "little"), digest_size=16)
    for column in (members.offsets, members.sizes, members.crcs, [len(name) for name in names]):
        hashed.update(np.array(column, "<u8").tobytes())
    hashed.update(b"".join(names))
    return hashed.hexdigest()


def _columns(members: Members, samples: Samples) -> tuple[list[bytes], int]:
    """A column of places for each part that occurs, and the bits that say which."""
    whole = np.empty(len(members) + 1, _COLUMN)
    sizes = np.array([*members.sizes, 0], "<u8")
    whole["offset"], whole["crc"] = [*members.offsets, _NOWHERE], [*members.crcs, 0]
    whole["size"] = np.minimum(sizes, 2**32 - 1)  # what is larger is no part of a sample
    columns: list[bytes] = []
    bits = 0
    for part, numbers in enumerate(samples.parts):
        chosen = whole[np.array(numbers, np.int64)]  # -1, not there, is the last
        if len(chosen) and int(chosen["offset"].min()) != _NOWHERE:
            columns.append(chosen.tobytes())
            bits |= 1 << part
    return columns, bits


def _ends(texts: Sequence[bytes]) -> bytes:
    return np.cumsum([len(text) for text in texts], dtype="<u4").tobytes()


def _rising(ends: NDArray[Any], last: int) -> bool:
    """Whether these are the ends of consecutive pieces that make up `last` bytes."""
    if not len(ends):
        return last == 0
    return bool(np.all(ends[1:] >= ends[:-1])) and int(ends[-1]) == last
