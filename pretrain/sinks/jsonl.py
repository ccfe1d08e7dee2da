"""RUN_DIR/metrics.jsonl: one JSON object per report, none twice, also after a resume. The truth."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pretrain.fencing import Records, replace


class JsonLines:
    """`{"step": 100, "time": 1.8e9, "samples": 6400, "train/loss": 3.21, ...}` per line.

    `time` is in Unix seconds; what is not finite is null.

    Each line reaches the operating system at once, so a killed process loses none.
    """

    def __init__(self, path: Path, *, after: int = 0) -> None:
        """Open the file of a run.

        Args:
            path: created if it is not there.
            after: the step the run goes on from. Later records are superseded: they are cut off.
        """
        cut(path, after=after)
        self._file = Records(path)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Append a report, and bring it to the disk itself: a checkpoint never outlives its records."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        record = {"step": step, "time": round(time.time(), 3), **finite}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        os.fsync(self._file.fileno())

    def note(self, text: str) -> None:
        """Nothing: sentences are for people, this file is for programs."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file, in order; a last line torn by a crash is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def cut(path: Path, *, after: int) -> None:
    """Keep the records up to a step. The old file stands until the new one is whole."""
    if not path.exists():
        return
    kept = b"".join(json.dumps(record).encode() + b"\n" for record in read(path) if record["step"] <= after)
    if kept != path.read_bytes():
        replace(path, kept)
