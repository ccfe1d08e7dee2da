"""Locks on files, which the kernel frees when their holder dies."""

from __future__ import annotations

import os
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path


def lock(descriptor: int, *, wait: bool = False) -> bool | None:
    """Lock a file until it is closed.

    Args:
        descriptor: of the open file.
        wait: until whoever holds it is done.

    Returns:
        False if another holds it, None if its file system has no locks.
    """
    try:
        flock(descriptor, LOCK_EX if wait else LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def still_names(path: Path, descriptor: int) -> bool:
    """Whether a path still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
