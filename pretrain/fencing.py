"""Who may write in a run directory: the start whose token stands in RUN_DIR/lock, and no process before it.

    process 4711 on node7
    {"token": "5f0c3a9be01d7724", "job": "12", "restart": 1, "number": 1}

The kernel's lock on that file keeps two starts apart, and goes with its process. It does not where a node is
lost: Slurm starts the job again on another one while the old processes may still run, or come back with the
node, and hold the lock or not. So a later start of the same job takes the lock over, whoever holds it, by
putting another file in its place; and whoever writes in the directory first looks whether the token is still
its own. What a program writes there goes through here, and a process that is fenced off writes nothing.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from datasets import atomic
from datasets.errors import UserError
from pretrain.place import Attempt, attempt_here

_held: dict[Path, str] = {}
"""The run directories that this process writes in, and its token of each."""


class FencedError(Exception):
    """Another start has taken the run directory over: this process is of the past and only leaves."""


@dataclass(frozen=True, slots=True)
class _Holder:
    """What a lock file says."""

    process: str
    token: str
    attempt: Attempt | None


def take(out: Path) -> tuple[TextIO, str]:
    """Hold the lock of a run directory, from now on; the open file, and the token of this start.

    Raises:
        UserError: another process holds it, and it is not an earlier start of our job.
    """
    path, mine, token = out / "lock", attempt_here(), secrets.token_hex(8)
    while True:
        lock = path.open("a+")
        try:
            # The kernel drops it with the process, also on kill -9; the file itself stays and means nothing.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            holder = _read(path)
            if not is_later(mine, holder.attempt if holder else None):
                process = holder.process if holder and holder.process else "another process"
                raise UserError(
                    f"the run directory {out} is in use by {process}: wait for it, stop it, or choose "
                    "another --out"
                ) from error
            lock = _put_in_place(path, token)
        if _is_there(lock, path):
            break
        lock.close()  # it was replaced between opening and locking
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    lock.write(json.dumps({"token": token, **(asdict(mine) if mine else {})}) + "\n")
    lock.flush()
    os.fsync(lock.fileno())
    hold(out, token)
    return lock, token


def hold(out: Path, token: str) -> None:
    """From now on this process writes in the directory with that token, which its rank zero took."""
    _held[out.absolute()] = token


def token_of(out: Path) -> str:
    """The token that this process writes with in a directory; empty for none."""
    return _held.get(out.absolute(), "")


def leave(out: Path, token: str) -> None:
    """The end of `hold`."""
    if _held.get(out.absolute()) == token:
        del _held[out.absolute()]


def check(path: Path) -> None:
    """Called before anything is written in a run directory; does nothing where this process holds none.

    Args:
        path: what will be written, or a folder.

    Raises:
        FencedError: a later start has taken the directory over.
    """
    path = path.absolute()
    for out, token in _held.items():
        if path.is_relative_to(out):
            holder = _read(out / "lock")
            if holder is None or holder.token != token:
                by = f" by {holder.process}" if holder and holder.process else ""
                raise FencedError(
                    f"the run directory {out} was taken over{by}: process {os.getpid()} on "
                    f"{os.uname().nodename} is of an earlier start and leaves without writing in it"
                )


def replace(path: Path, content: bytes, *, lasting: bool = True) -> None:
    """`datasets.atomic.replace`, for what lies in a run directory.

    Raises:
        FencedError: see `check`.
    """
    check(path)
    atomic.replace(path, content, lasting=lasting)


class Records(io.FileIO):
    """A file of lines in a run directory, unbuffered: what is appended is there, or was refused.

    Raises:
        FencedError: see `check`.
    """

    def __init__(self, path: Path) -> None:
        """Open it for reading and appending."""
        super().__init__(path, "a+")
        self._path = path

    def write(self, data: Any) -> int:
        """Append bytes."""
        check(self._path)
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        """Cut off what stands after that many bytes."""
        check(self._path)
        return super().truncate(size)


def is_taken_over(out: Path) -> bool:
    """Whether a later start of our job than this one holds the directory."""
    holder, mine = _read(out / "lock"), attempt_here()
    return holder is not None and mine is not None and is_later(holder.attempt, mine)


def is_later(one: Attempt | None, other: Attempt | None) -> bool:
    """Whether one is a start of the same job as the other, and came after it."""
    if one is None or other is None or one.job != other.job:
        return False
    return (one.restart, one.number) > (other.restart, other.number)


def _read(path: Path) -> _Holder | None:
    """What stands in a lock file now, also where a network file system remembers something older."""
    try:
        with suppress(StopIteration):
            next(path.parent.iterdir())  # looks again which file has that name
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return None
    try:
        said = json.loads(lines[1])
        token = said.pop("token")
        return _Holder(lines[0], token, Attempt(**said) if said else None)
    except (ValueError, TypeError, KeyError, IndexError):
        return _Holder(lines[0] if lines else "", "", None)


def _put_in_place(path: Path, token: str) -> TextIO:
    """Another file of that name, locked by us before anybody sees it."""
    beside = path.with_name(f"lock.tmp-{token}")
    lock = beside.open("a+")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    beside.replace(path)
    return lock


def _is_there(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
