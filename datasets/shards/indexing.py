"""Making sidecars: for one shard or for many at once, so that several processes do each once."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from time import thread_time
from typing import NamedTuple

from datasets.errors import UserError
from datasets.homes import at_home
from datasets.locks import lock, still_names
from datasets.remote.fetch import Remote, fetch_to, is_remote, shown, size_of
from datasets.shards import sidecar
from datasets.shards.grouping import group, printable
from datasets.shards.scan import Problem, scan
from datasets.shards.sidecar import Head


class Job(NamedTuple):
    """A shard whose sidecar is wanted."""

    url: str
    """Absolute local path or URL."""
    sidecar: str
    """Local path to write to."""


class Outcome(NamedTuple):
    """What became of a job."""

    job: Job
    head: Head | None
    """Of its sidecar, unless the shard is damaged."""
    problem: Problem | None
    """What the damage is."""
    seconds: float = 0.0
    """CPU time that indexing took, or 0 if the sidecar stood already."""
    changed: bool = False
    """Whether it was indexed before with other content."""
    unusable: int = 0
    """How many samples have a fault, if it was indexed now."""


def standing(path: str) -> tuple[str, Head | None]:
    """Where a local shard's sidecar is, and its header; if none is valid, where it should be written."""
    beside, cached = _places(path)
    for place in (beside, cached):
        if (head := valid(Path(place), path)) is not None:
            return place, head
    return cached, None  # what a person had written beside a shard is not replaced by the way


def promised(path: str) -> Head | None:
    """The header of the sidecar beside a local shard, whether the shard is still that one or not."""
    return _read(Path(_places(path)[0]))


def indexed_as(name: str) -> str:
    """Where a shard's sidecar is, valid or out of date; nothing if there is none."""
    places = () if is_remote(name) else _places(name)
    return next((place for place in places if Path(place).is_file()), "")


def valid(path: Path, shard: str) -> Head | None:
    """The header of a sidecar if it is sound and the local shard is as it was when it was indexed."""
    try:
        status = Path(shard).stat()
    except OSError:
        return None
    head = _read(path)
    now = (status.st_size, status.st_mtime_ns)
    return head if head is not None and (head.bytes, head.mtime_ns) == now else None


def cache_folder() -> Path:
    """Where sidecars are kept of shards that have none beside them."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return at_home(home) / "medley" / "index"


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def index_one(job: Job) -> Outcome:
    """Write a shard's sidecar, unless a valid one stands there.

    Raises:
        UserError: the shard cannot be read, or the sidecar not written.
    """
    started = thread_time()
    path = Path(job.sidecar)
    with _alone(path):
        head = valid(path, job.url) if not is_remote(job.url) else _valid_remote(path, job.url)
        if head is not None:
            return Outcome(job, head, None)
        before = _read(path)
        done = _index_remote(job, path) if is_remote(job.url) else _index(job, Path(job.url), path)
    changed = done.head is not None and before is not None and done.head.digest != before.digest
    return done._replace(seconds=thread_time() - started, changed=changed)


def _places(path: str) -> tuple[str, str]:
    """Where the sidecar of a local shard may be: beside it, or in the cache folder."""
    name = blake2b(os.fsencode(path), digest_size=16).hexdigest()
    return f"{path}.idx", str(cache_folder() / f"{name}.idx")


def _index(job: Job, path: Path, target: Path) -> Outcome:
    """From a file, which may be a copy."""
    found = scan(path)
    if found.problem is not None:
        return Outcome(job, None, found.problem)
    samples = group(found.members)
    mtime_ns = 0 if is_remote(job.url) else found.mtime_ns
    with _writing(target):
        head = sidecar.write(target, found, samples, mtime_ns=mtime_ns)
    return Outcome(job, head, None, unusable=len(samples.faults))


def _index_remote(job: Job, target: Path) -> Outcome:
    """Through a file beside the sidecar: that disk was chosen by the user, the temporary one may be small."""
    part = target.with_name(f"{target.name}.part")
    try:
        with _writing(target):
            fetch_to(job.url, part, remote=Remote())
        return _index(job, part, target)
    finally:
        part.unlink(missing_ok=True)


def _valid_remote(path: Path, url: str) -> Head | None:
    head = _read(path)
    if head is None or head.mtime_ns != 0:
        return None
    return head if head.bytes == size_of(url, remote=Remote()) else None


def _read(path: Path) -> Head | None:
    """The header of a sidecar, if a sound one stands there."""
    try:
        return Head.read(path)
    except UserError:
        return None


@contextmanager
def _alone(path: Path) -> Generator[None]:
    """Hold the lock of a sidecar; the kernel frees that of a process that dies."""
    held = path.with_name(f"{path.name}.lock")
    with _writing(path):
        there = next(folder for folder in path.parents if folder.is_dir())
        if not there.stat().st_mode & 0o222:  # which would not stop root, as in a container
            raise PermissionError(errno.EACCES, "the folder is read-only")
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with _writing(path):
            descriptor = os.open(held, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            lock(descriptor, wait=True)  # a file system may have no locks: then the work may be done twice
            if not still_names(held, descriptor):
                continue  # its last holder has removed it
            try:
                yield
                return
            finally:
                held.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


@contextmanager
def _writing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): index into another folder with "
            "`python -m datasets.index ... --out DIR`, or set XDG_CACHE_HOME"
        ) from error


def shown_url(url: str) -> str:
    """A path or URL for messages."""
    return shown(url) if is_remote(url) else printable(url)
