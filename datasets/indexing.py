"""Making sidecars: for one shard or for many at once, so that several processes do each once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, flock
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from time import monotonic, thread_time
from typing import NamedTuple

from datasets import sidecar
from datasets.errors import UserError
from datasets.grouping import group
from datasets.remote import Remote, fetch_to, is_remote, shown, size_of
from datasets.scan import Problem, scan
from datasets.sidecar import MAGIC, Head

_EVERY = 20.0  # seconds between two lines of progress where there is no terminal


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
    seconds: float
    """CPU time that indexing took, or 0 if the sidecar stood already."""


def standing(path: str, *, cached: bool = True) -> tuple[str, Head | None]:
    """Where a local shard's sidecar is, and its header; if none is valid, where it should be written.

    Args:
        path: absolute, of the shard.
        cached: look beside it first and into the cache folder then; otherwise only beside it.
    """
    beside = f"{path}.idx"
    if (head := valid(Path(beside), path)) is not None or not cached:
        return beside, head
    own = str(cache_folder() / f"{blake2b(os.fsencode(path), digest_size=16).hexdigest()}.idx")
    if (head := valid(Path(own), path)) is not None:
        return own, head
    return (beside if _is_ours(Path(beside)) else own), None


def valid(path: Path, shard: str) -> Head | None:
    """The header of a sidecar if it is sound and the local shard is as it was when it was indexed."""
    try:
        head, status = Head.read(path), Path(shard).stat()
    except (UserError, OSError):
        return None
    return head if (head.bytes, head.mtime_ns) == (status.st_size, status.st_mtime_ns) else None


def cache_folder() -> Path:
    """Where sidecars are kept of shards that have none beside them."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "medley" / "index"


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
            return Outcome(job, head, None, 0.0)
        if is_remote(job.url):
            head, problem = _index_remote(job.url, path)
        else:
            head, problem = _index(Path(job.url), path, local=True)
    return Outcome(job, head, problem, thread_time() - started)


def index_all(
    jobs: list[Job], *, workers: int, processes: bool, say: Callable[[str], None] | None = None
) -> list[Outcome]:
    """Index shards in parallel; the outcomes stand as the jobs do.

    Args:
        jobs: what to do.
        workers: how many at once.
        processes: let each be a process of its own; threads share an interpreter, which 4 GB/s are too much
            for, but can be used in any program.
        say: told how far it is, now and then; on a terminal a bar is drawn instead.

    Raises:
        UserError: a shard cannot be read, or a sidecar not written.
    """
    pool: Executor
    if processes and min(workers, len(jobs)) > 1:
        pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn"))
    else:
        pool = ThreadPoolExecutor(workers)
    with pool:
        futures = [pool.submit(index_one, job) for job in jobs]
        try:
            _watch(futures, say)
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _index(path: Path, target: Path, *, local: bool) -> tuple[Head | None, Problem | None]:
    found = scan(path)
    if found.problem is not None:
        return None, found.problem
    mtime = found.mtime_ns if local else 0
    with _writing(target):
        return sidecar.write(target, found, group(found.members), mtime_ns=mtime), None


def _index_remote(url: str, target: Path) -> tuple[Head | None, Problem | None]:
    """Through a file beside the sidecar: that disk was chosen by the user, the temporary one may be small."""
    part = target.with_name(f"{target.name}.part")
    try:
        with _writing(target):
            fetch_to(url, part, remote=Remote())
        return _index(part, target, local=False)
    finally:
        part.unlink(missing_ok=True)


def _valid_remote(path: Path, url: str) -> Head | None:
    try:
        head = Head.read(path)
    except UserError:
        return None
    return head if head.mtime_ns == 0 and head.bytes == size_of(url, remote=Remote()) else None


def _is_ours(path: Path) -> bool:
    """Whether a sidecar of ours stands there and can be replaced; other programs call files .idx too."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC and os.access(path.parent, os.W_OK)
    except OSError:
        return False


@contextmanager
def _alone(path: Path) -> Generator[None]:
    """Hold the lock of a sidecar; the kernel frees that of a process that dies."""
    lock = path.with_name(f"{path.name}.lock")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with _writing(path):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with suppress(OSError):  # a file system without locks: the work may be done twice
                flock(descriptor, LOCK_EX)
            if not lock.exists() or not os.path.samestat(os.fstat(descriptor), lock.stat()):
                continue  # its last holder has removed it
            try:
                yield
                return
            finally:
                lock.unlink(missing_ok=True)
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


def _watch(futures: list[Future[Outcome]], say: Callable[[str], None] | None) -> None:
    """Tell how far it is until all is done; the first that fails raises."""
    done: Iterable[Outcome] = (future.result() for future in as_completed(futures))
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        for _ in track(done, "indexing", total=len(futures), console=Console(stderr=True), transient=True):
            pass
        return
    said = monotonic()
    for count, outcome in enumerate(done, start=1):
        if say is not None and monotonic() - said > _EVERY:
            said = monotonic()
            say(f"indexed {count} of {len(futures)} shards, last {shown_url(outcome.job.url)}")


def shown_url(url: str) -> str:
    """A path or URL for messages."""
    return shown(url) if is_remote(url) else url
