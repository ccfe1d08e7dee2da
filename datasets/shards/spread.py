"""Work on many shards at once, told about while it goes on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from time import monotonic
from typing import TypeVar

_EVERY = 20.0  # seconds between two lines of progress where there is no terminal
J = TypeVar("J")
R = TypeVar("R")


def spread(
    work: Callable[[J], R],
    jobs: list[J],
    *,
    verb: str,
    workers: int,
    processes: bool,
    say: Callable[[str], None] | None = None,
) -> list[R]:
    """What `work` makes of each job, in the order of the jobs; the first that raises ends it all.

    Args:
        work: a function of a module, if processes are to call it.
        jobs: what to do.
        verb: what is being done to a shard, such as "indexed".
        workers: how many at once.
        processes: let each be a process of its own; threads share an interpreter, which 4 GB/s are too much
            for, but can be used in any program.
        say: told how far it is, now and then; on a terminal a bar is drawn instead.
    """
    pool: Executor
    if processes and min(workers, len(jobs)) > 1:
        pool = ProcessPoolExecutor(
            min(workers, len(jobs)),
            mp_context=get_context("spawn"),
            initializer=signal.signal,
            initargs=(signal.SIGINT, signal.SIG_IGN),  # of Ctrl-C they learn from this process
        )
    else:
        pool = ThreadPoolExecutor(workers)
    with pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            _watch(futures, verb, say)
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _watch(futures: list[Future[R]], verb: str, say: Callable[[str], None] | None) -> None:
    """Tell how far it is until all is done, or one has failed."""
    done: Iterable[R] = (future.result() for future in as_completed(futures))
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        for _ in track(done, f"shards {verb}", len(futures), console=Console(stderr=True), transient=True):
            pass
        return
    said = monotonic()
    for count, _ in enumerate(done, start=1):
        if say is not None and monotonic() - said > _EVERY:
            said = monotonic()
            say(f"{verb} {count} of {len(futures)} shards")
