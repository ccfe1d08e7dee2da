"""Replace a small file so that a reader, or the next start after a crash, sees the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path


def replace(path: Path, content: bytes, *, lasting: bool = True) -> None:
    """Write beside, sync, rename.

    Args:
        path: what is replaced, or made.
        content: what it holds then.
        lasting: whether it has to survive a crash of the machine, for which it is synced.
    """
    beside = path.with_name(f"{path.name}.tmp")
    with beside.open("wb") as file:
        file.write(content)
        if lasting:
            file.flush()
            os.fsync(file.fileno())
    beside.replace(path)
