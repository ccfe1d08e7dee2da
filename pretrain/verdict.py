"""How a start ended, as the first of its ranks to know says it: one small file for whoever waits outside.

torchrun and srun end with a code of their own making: 1, or that of the signal with which they ended the
other ranks. The first rank that leaves writes what it leaves for, before its connections close and the others
fail because of it; who comes later changes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "MEDLEY_VERDICT"
"""The environment variable that names the file; without it nothing is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why a start ended."""

    code: int
    reason: str
    """One sentence."""
    rank: int = 0


def give(verdict: Verdict, environment: Mapping[str, str] = os.environ) -> Verdict:
    """Write it, where somebody asked for it and nobody has before; the one that was first."""
    path = environment.get(VARIABLE)
    if not path:
        return verdict
    # What cannot be written costs a reason; the end itself has its own.
    with suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps(asdict(verdict)).encode())
    return read(Path(path)) or verdict


def read(path: Path) -> Verdict | None:
    """What was written, if anything was."""
    try:
        return Verdict(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
