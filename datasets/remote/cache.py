"""Files that were fetched, on a local disk, shared by the processes of a node and bounded in bytes.

A file is written beside under a lock, so that one process brings it and the others wait, and renamed when it
is whole. The kernel frees the lock of a process that dies; what it left is not trusted and overwritten. On a
file system without locks each brings its own, and their bytes together may pass the bound for a while. Those
that were used longest ago are deleted, also under a reader's feet: it finds nothing then, and fetches again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from threading import get_ident
from time import monotonic, sleep
from typing import NamedTuple

from datasets.errors import UserError
from datasets.locks import lock, still_names

_OURS = re.compile(r"[0-9a-f]{32}(\.\d+-\d+)?(\.part)?")
_FREED = 0.1  # of the cache, at once: a scan of the folder serves many files
_LOOK = (0.002, 0.05)  # seconds between two looks at another's lock, first and at most
_LEDGER_PATIENCE = 10.0  # seconds: it is held for as long as files are deleted


class Cache:
    """Files by the name that `name_of` gives them, each written once and never changed."""

    def __init__(self, folder: Path, *, limit: int) -> None:
        """Open or begin a cache.

        Args:
            folder: on a local disk; processes that name the same one share it.
            limit: bytes that all files together may have, those being written among them.

        Raises:
            UserError: the folder cannot be written.
        """
        self.folder = folder
        self._limit = limit
        self._ledger = folder / "bytes"
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._ledger, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))

    def read(self, name: str, begin: int = 0, size: int = -1, *, whole: int | None = None) -> bytes | None:
        """A part of a file, by default all of it; None if it cannot be read, or has not `whole` bytes."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            length = os.fstat(descriptor).st_size
            if whole not in (None, length):
                return None
            with suppress(OSError):  # another's file can be read but not touched
                os.utime(descriptor)
            return os.pread(descriptor, length if size < 0 else size, begin)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def holds(self, name: str, whole: int) -> bool:
        """Whether a file is here with that many bytes; it is used soon."""
        path = self.folder / name
        try:
            found = path.stat().st_size == whole
        except OSError:
            return False
        with suppress(OSError):
            os.utime(path)
        return found

    def drop(self, name: str) -> None:
        """Delete a file that proved wrong."""
        with self._writing():
            (self.folder / name).unlink(missing_ok=True)

    def bring(
        self, name: str, fetch: Callable[[], bytes], *, whole: int | None, patience: float
    ) -> bytes | None:
        """Have `fetch` bring a file, unless another process or thread brings it first.

        Args:
            name: of the file.
            fetch: gives its bytes; what it raises goes through.
            whole: its bytes; a file of another size is replaced. None: any size will do.
            patience: seconds to wait for another's fetch, before this one fetches for itself.

        Returns:
            The bytes, or None if another has brought them: they are to be read.

        Raises:
            UserError: the folder cannot be written.
        """
        until, pause = monotonic() + patience, _LOOK[0]
        part = self.folder / f"{name}.part"
        while True:
            with self._opened(part) as descriptor:
                locked = lock(descriptor)
                if locked:
                    if still_names(part, descriptor):
                        return self._bring(name, part, descriptor, fetch, whole)
                    continue  # it was renamed or given up as we looked
            if locked is None:
                part.unlink(missing_ok=True)
            if locked is None or monotonic() > until:  # whoever fetches is not known, or hangs
                own = self.folder / f"{name}.{os.getpid()}-{get_ident()}.part"
                with self._opened(own) as descriptor:
                    lock(descriptor)
                    return self._bring(name, own, descriptor, fetch, whole)
            sleep(pause)
            pause = min(pause * 2, _LOOK[1])

    def _bring(
        self, name: str, part: Path, descriptor: int, fetch: Callable[[], bytes], whole: int | None
    ) -> bytes | None:
        """With the lock of the part."""
        path = self.folder / name
        try:
            if path.exists() if whole is None else self.holds(name, whole):
                return None
            content = fetch()
            with self._writing():
                os.ftruncate(descriptor, 0)  # of one who died
                if self._reserve(descriptor, len(content)):
                    with open(descriptor, "wb", closefd=False) as file:
                        file.write(content)
                    part.replace(path)
            return content
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, descriptor: int, size: int) -> bool:
        """Make room, and take it by giving the part its size. False: there is none."""
        if size > self._limit:
            return False
        with self._opened(self._ledger) as ledger:
            until = monotonic() + _LEDGER_PATIENCE
            while lock(ledger) is False and monotonic() < until:
                sleep(_LOOK[0])
            noted = os.pread(ledger, 32, 0)
            used = int(noted) if noted.isdigit() else self._limit + 1
            if used + size > self._limit:
                used = self._evict(size)
            if used + size > self._limit:
                return False
            os.pwrite(ledger, b"%032d" % (used + size), 0)
            os.ftruncate(descriptor, size)
        return True

    def _evict(self, size: int) -> int:
        """Delete what was used longest ago until `size` bytes and some more fit; returns the bytes left."""
        files = sorted(self._scan())
        used = sum(each.size for each in files)
        if used + size <= self._limit:  # others deleted what the ledger still has
            return used
        for each in files:
            if used + size <= self._limit * (1 - _FREED):
                break
            if each.name.endswith(".part"):
                used -= each.size if self._clear(self.folder / each.name) else 0
            else:
                (self.folder / each.name).unlink(missing_ok=True)
                used -= each.size
        return used

    def _scan(self) -> Generator[_Found]:
        """What is ours: the folder may hold a user's files too."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _OURS.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        yield _Found(status.st_mtime_ns, entry.name, status.st_size)

    def _clear(self, part: Path) -> bool:
        """Delete a part that nobody writes, with its lock: who opens it now finds that it is gone."""
        with suppress(FileNotFoundError):
            descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
            try:
                if not lock(descriptor):  # without locks, whose it is is not known
                    return False
                if still_names(part, descriptor):
                    part.unlink()
            finally:
                os.close(descriptor)
        return True

    @contextmanager
    def _opened(self, path: Path) -> Generator[int]:
        with self._writing():
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the cache {self.folder} cannot be written ({error.strerror}): give a folder on a local "
                "disk with --remote.folder, or fewer bytes with --remote.cache"
            ) from error


def name_of(*what: str | int) -> str:
    """The name of the file that holds this."""
    return blake2b(ascii(what).encode(), digest_size=16).hexdigest()


class _Found(NamedTuple):
    used: int
    name: str
    size: int
