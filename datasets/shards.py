"""Tar shards as they lie on disk: which files a pattern names, which members a shard has, and their bytes.

A shard is read strictly, because a lenient reader loses half of a damaged one without a word. Only headers
are read on opening; bytes come by `pread`, which any thread may call. Nothing is extracted or written.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from datasets.errors import ContentError, UserError

_PARTS = {
    "jpg": "image",
    "jpeg": "image",
    "png": "image",
    "webp": "image",
    "txt": "text",
    "json": "record",
    "cls": "number",
}
_LARGEST = 64 * 2**20  # bytes of one member
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Member:
    """A file within a shard."""

    name: str
    offset: int
    size: int
    odd: str = ""
    """What it is, if not a plain file."""


@dataclass(slots=True)
class Entry:
    """The members of one sample, or why they are none."""

    key: str
    image: Member | None = None
    text: Member | None = None
    record: Member | None = None
    number: Member | None = None
    fault: str = ""

    @property
    def described(self) -> bool:
        """Whether anything is written beside its image."""
        return any((self.text, self.record, self.number))


class Shard:
    """An open tar file and the samples in it."""

    def __init__(self, path: Path) -> None:
        """Index the samples of a tar.

        Raises:
            UserError: it cannot be opened, is no tar, is damaged, or holds no image with a text.
        """
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise UserError(_unopened(path, error)) from error
        try:
            self.bytes = os.fstat(self._file.fileno()).st_size
            self.members = tuple(_members(path, self._file, self.bytes))
            self.entries = _entries(self.members)
            self._refuse_if_nothing_pairs()
        except BaseException:
            self._file.close()
            raise

    def read(self, member: Member) -> bytes:
        """The bytes of a member, from any thread.

        Raises:
            ContentError: the member is a link or the like, or absurdly large.
            OSError: the file could not be read, or has changed since it was opened.
        """
        if member.odd:
            raise ContentError(f"{printable(member.name)} is {member.odd}", kind="member")
        if member.size > _LARGEST:
            raise ContentError(
                f"{printable(member.name)} has {member.size} bytes, more than {_LARGEST}", kind="member"
            )
        data = os.pread(self._file.fileno(), member.size, member.offset)
        if len(data) < member.size:
            raise OSError(errno.EIO, "the shard has become shorter since it was opened", str(self.path))
        return data

    def close(self) -> None:
        """Close the file; no member can be read afterwards."""
        self._file.close()

    def _refuse_if_nothing_pairs(self) -> None:
        if any(entry.image and entry.described for entry in self.entries):
            return
        suffixes = Counter(Path(member.name).suffix or "suffixless" for member in self.members)
        holds = ", ".join(f"{count} {printable(suffix)}" for suffix, count in suffixes.most_common(5))
        raise UserError(
            f"{self.path} has no image with a text: a sample is KEY.jpg (.jpeg, .png, .webp) with KEY.txt, "
            f"KEY.json or KEY.cls, and it holds {f'{holds} members' if holds else 'nothing'}"
        )


def expand(patterns: str) -> list[Path]:
    """The files that comma-separated globs and brace ranges name, in order.

    Raises:
        UserError: a pattern matches nothing, is no local path, or names a file again.
    """
    from webdataset.shardlists import expand_urls

    paths: list[Path] = []
    between = r",(?![^{}]*\})"  # commas, but not those within braces
    for pattern in filter(None, map(str.strip, re.split(between, patterns))):
        if "://" in pattern or pattern.startswith("pipe:"):
            raise UserError(f"{pattern} is not a local path: only local tar files can be read for now")
        try:
            expanded = expand_urls(os.path.expanduser(pattern))  # noqa: PTH111 (no path yet)
        except ValueError as error:
            raise UserError(f"{pattern} has braces that do not match") from error
        for one in expanded:
            paths += [Path(one)] if Path(one).is_file() else _glob(one)
    if not paths:
        raise UserError(f"{patterns!r} names no tar file: give a path, a glob or a brace range")
    twice = [path for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is named twice by {patterns}: name every shard once")
    return paths


def printable(name: str) -> str:
    """A member's name as it can be shown and logged: control characters and broken bytes are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _glob(pattern: str) -> list[Path]:
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path.glob refuses absolute patterns)
    found = [path for path in map(Path, sorted(names)) if path.is_file()]
    if found:
        return found
    if Path(pattern).is_dir():
        shards = Path(pattern, "*.tar")
        raise UserError(f"{pattern} is a directory: name the shards in it, as in '{shards}'")
    nearest = next(parent for parent in Path(pattern).absolute().parents if parent.is_dir())
    inside = sorted(path.name for path in nearest.iterdir())
    holds = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
    raise UserError(
        f"no file matches {pattern}; the nearest directory that exists is {nearest}, which holds "
        f"{holds or 'nothing'}"
    )


def _unopened(path: Path, error: OSError) -> str:
    if error.errno == errno.EMFILE:
        return f"too many files are open at {path}: allow more than there are shards, with `ulimit -n`"
    return f"cannot open {path}: {error.strerror}"


def _members(path: Path, file: BinaryIO, size: int) -> Iterator[Member]:
    """All members but directories, after proof that nothing is missing up to the end mark."""
    reached = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                if info.size < 0 or tar.offset <= reached:  # would be read for ever
                    raise tarfile.ReadError("a header points back")
                reached = tar.offset
                if not info.isdir():
                    yield Member(info.name, info.offset_data, info.size, _odd(info))
            reached = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if reached == 0:
            raise UserError(f"{path} is not a tar file; a compressed one must be unpacked first") from error
        raise UserError(_damaged(path, reached, str(error))) from error
    _check_end(path, file, reached, size)


def _check_end(path: Path, file: BinaryIO, at: int, size: int) -> None:
    """Where the headers end, zeros must begin and go on: `tarfile` takes any broken header for the end."""
    if size - at < _BLOCK:
        raise UserError(_damaged(path, at, "it ends without an end mark"))
    file.seek(at)
    if file.read(_BLOCK).strip(b"\0"):
        raise UserError(_damaged(path, at, "the header is broken"))
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise UserError(_damaged(path, at, "there is more after the end mark"))


def _damaged(path: Path, at: int, how: str) -> str:
    return f"{path} is damaged at byte {at} ({how}): fetch or pack it again, or leave it out"


def _odd(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return "a link, not a file"
    return "" if info.isreg() and not info.issparse() else "a special file"


def _entries(members: tuple[Member, ...]) -> list[Entry]:
    """Samples in the order of their first members; what belongs to none is left out."""
    entries: dict[str, Entry] = {}
    for member in members:
        key, _, suffix = member.name.rpartition(".")
        part = _PARTS.get(suffix.lower())
        if part is None:
            continue
        entry = entries.setdefault(key, Entry(printable(key)))
        before: Member | None = getattr(entry, part)
        if before is None:
            setattr(entry, part, member)
        else:
            entry.fault = f"{printable(before.name)} and {printable(member.name)} are both its {part}"
    for entry in entries.values():
        if entry.image is None:
            entry.fault = entry.fault or "no image beside its text"
        elif not entry.described:
            entry.fault = entry.fault or "no .txt, .json or .cls beside its image"
    return list(entries.values())
