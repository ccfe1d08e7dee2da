"""Tar headers that are not plain: long names, extended headers, sizes in base 256, links, sparse files.

The fast path of `scan` knows one kind of header; this reads all the others, one member at a time, as
`tarfile` does (a test compares them), but in bounded memory and time: an extended header that claims
gigabytes, or points back, is damage and not a reason to read on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

BLOCK = 512
_LONGEST = 1 << 20  # bytes of an extended header; a name or a comment is far below
_GNU = b"LKS"  # types whose prefix field holds something else
_EXTENDED = b"LKxXg"
_WITHOUT_DATA = b"123456"  # links, devices, folders, fifos: whatever size they claim, none follows
_ODD = {b"1": "a link", b"2": "a link", b"5": "a folder", b"S": "a sparse file"}


class BrokenHeaderError(Exception):
    """A header that cannot be followed."""

    def __init__(self, kind: str, at: int, how: str) -> None:
        super().__init__(how)
        self.kind, self.at, self.how = kind, at, how


class Header(NamedTuple):
    """A member as its headers describe it."""

    name: str
    data: int
    """Where its bytes begin in the file."""
    size: int
    after: int
    """Where the next header begins."""
    odd: str
    """What it is, if not a plain file."""


@dataclass(slots=True)
class _Told:
    """What extended headers say about the member that follows; the first of several prevails."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False


def follow(read: Callable[[int, int], bytes], at: int) -> Header:
    """The member whose first header lies at `at`.

    Args:
        read: the bytes of the file at an offset, fewer where it ends.
        at: offset of a block that is not zeros.

    Raises:
        BrokenHeaderError: a header is damaged, cut off or absurd.
    """
    told = _Told()
    while True:
        block = read(at, BLOCK)
        if len(block) < BLOCK:
            raise BrokenHeaderError("truncated", at, "it ends in a header")
        check(block, at)
        kind, size = block[156:157], _number(block[124:136], at)
        if kind not in _EXTENDED:
            return _member(block, kind, size, at, told, read)
        if size > _LONGEST:
            raise BrokenHeaderError("header", at, f"an extended header of {size} bytes")
        payload = read(at + BLOCK, size)
        if len(payload) < size:
            raise BrokenHeaderError("truncated", at, "it ends in an extended header")
        if kind == b"L":
            told.name = _text(payload) if told.name is None else told.name
        elif kind in b"xXg":
            _extended(payload, told, at, everywhere=kind == b"g")
        at += BLOCK + padded(size)


def check(block: bytes, at: int) -> None:
    """Refuse a header whose sum is not the one written in it, read unsigned or (old archivers) signed."""
    claimed = _number(block[148:156], at)
    total = sum(block) - sum(block[148:156]) + 8 * 32
    if claimed == total:
        return
    if claimed != total - 256 * sum(value > 127 for value in block[:148] + block[156:]):
        raise BrokenHeaderError("header", at, "the header's check sum is wrong")


def padded(size: int) -> int:
    """The bytes that a payload takes up: whole blocks."""
    return -(-size // BLOCK) * BLOCK


def _member(
    block: bytes, kind: bytes, size: int, at: int, told: _Told, read: Callable[[int, int], bytes]
) -> Header:
    name, prefix = _text(block[:100]), _text(block[345:500])
    odd = _ODD.get(kind, "" if kind in b"0\x007" else "a device or the like")
    if kind == b"\0" and name.endswith("/"):
        odd = "a folder"
    if odd == "a folder":
        name = name.rstrip("/")
    if prefix and kind not in _GNU:
        name = f"{prefix}/{name}"
    data = at + BLOCK
    if kind == b"S":
        more = block[482]
        while more:
            table = read(data, BLOCK)
            if len(table) < BLOCK:
                raise BrokenHeaderError("truncated", data, "it ends in a header")
            data, more = data + BLOCK, table[504]
    size = size if told.size is None else told.size
    if told.sparse and not odd:
        odd = "a sparse file"
    if kind in _WITHOUT_DATA:
        size = 0
    return Header(name if told.name is None else told.name, data, size, data + padded(size), odd)


def _extended(payload: bytes, told: _Told, at: int, *, everywhere: bool) -> None:
    """Take in the records `LENGTH KEY=VALUE` of a pax header."""
    begin = 0
    while begin < len(payload) and payload[begin]:
        space = payload.find(b" ", begin, begin + 12)
        digits = payload[begin : max(space, begin)]
        end = begin + int(digits) if digits.isdigit() else 0
        if not space < end <= len(payload) or payload[end - 1 : end] != b"\n":
            raise BrokenHeaderError("header", at, "the extended header is broken")
        key, _, value = payload[space + 1 : end - 1].partition(b"=")
        if everywhere and key in (b"path", b"size"):
            raise BrokenHeaderError("header", at, "a header renames or resizes every member")
        if key == b"path" and told.name is None:
            told.name = value.rstrip(b"/").decode("utf-8", "surrogateescape")
        elif key == b"size" and told.size is None:
            if not value.isdigit() or len(value) > 20:
                raise BrokenHeaderError("header", at, "the extended header is broken")
            told.size = int(value)
        told.sparse |= key.startswith(b"GNU.sparse.") and not everywhere
        begin = end


def _number(field: bytes, at: int) -> int:
    """A number in octal digits, or in base 256 if the first bit is set."""
    if field[0] & 0x80:
        number = int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    else:
        digits = field.partition(b"\0")[0].strip()
        number = int(digits, 8) if digits.isdigit() and b"8" not in digits and b"9" not in digits else -1
        number = 0 if not digits else number
    if number < 0:
        raise BrokenHeaderError("header", at, "the header is broken")
    return number


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
