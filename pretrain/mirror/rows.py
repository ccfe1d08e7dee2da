"""What metrics.jsonl says while it grows, as rows of W&B: one a step, with everything that is said of it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]
"""Value by name, `step` among them; what is null in the file is left out."""


class ReplacedError(Exception):
    """The file is another one now: a resume cut it back, and what was read of it is void."""


class Rows:
    """Reads a metrics file that is being written.

    A step may have two records, its report and its evaluation. So the newest step is held back until a later
    one begins, or until its reader says that nothing more will come.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._torn = b""
        self._held: Row = {}

    @property
    def last_step(self) -> int:
        """The newest step that was read; 0 before any."""
        return self._held.get("step", 0)

    def new(self, *, ended: bool = False) -> Iterator[Row]:
        """Rows that became complete since the last call; all of them if the file has ended.

        Raises:
            ReplacedError: begin again with another reader.
        """
        yield from self._merged(self._records())
        if ended and self._held:
            yield self._held
            self._held = {}

    def _merged(self, records: Iterable[Row]) -> Iterator[Row]:
        for record in records:
            if self._held and record["step"] != self.last_step:
                yield self._held
                self._held = {}
            self._held |= {name: value for name, value in record.items() if value is not None}

    def _records(self) -> Iterator[Row]:
        try:
            self._file = self._file or self._path.open("rb")
        except FileNotFoundError:
            return  # nothing was reported yet
        if self._replaced(self._file):
            raise ReplacedError
        *lines, self._torn = (self._torn + self._file.read()).split(b"\n")
        for line in lines:
            record = _record(line)
            if record is None:
                # Only a damaged disk gets here, and the other records are still worth seeing.
                logging.warning("%s: not a record: %r", self._path, line[:200])
            else:
                yield record

    def _replaced(self, file: BinaryIO) -> bool:
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return True
        return not os.path.samestat(os.fstat(file.fileno()), there) or there.st_size < file.tell()


def _record(line: bytes) -> Row | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
