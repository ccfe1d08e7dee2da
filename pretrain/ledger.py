"""Per step one line: which samples, which loss, which gradient norm. Steps run again must agree with it.

    STEP RANKS SAMPLES LOSS NORM
    120 1 5f0c3a9be01d7724 3ff1c28f60000000 3fe8a1b2c3d4e5f6

SAMPLES is a hash of the keys of the global batch in order, LOSS and NORM the bits of a float64, RANKS the
number of processes. After a resume the steps since the checkpoint are executed again: the same samples are
promised on any number of ranks, the same bits on the same number (in elastic runs on any). Only rank zero
writes.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from pretrain.fencing import Records

_LINE = re.compile(rb"(\d+) \d+ [0-9a-f]{16} [0-9a-f]{16} [0-9a-f]{16}")


class Ledger:
    """An append-only text file. Lines reach the operating system at once: a killed process loses none."""

    def __init__(self, path: Path, *, ranks: int = 1, elastic: bool = False) -> None:
        """Read what stands there; a last line torn by a crash is cut off.

        Args:
            path: the file.
            ranks: how many processes train now.
            elastic: whether the bits are promised on any number of them.
        """
        self._ranks, self._elastic = ranks, elastic
        self._file = Records(path)
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        matches = (_LINE.fullmatch(line) for line in content[:whole].splitlines())
        self._lines = {int(match[1]): match[0].decode() for match in matches if match}

    def record(self, step: int, samples: Sequence[str], *, loss: float, norm: float) -> str | None:
        """Append a step, or compare one that stands there already.

        Args:
            step: optimizer steps done, this one included.
            samples: keys of the global batch, in order, of all ranks and sources.
            loss: what was minimised.
            norm: the gradient's norm before clipping.

        Returns:
            What differs from the first time, in words, or None. The first line stays.
        """
        line = f"{step} {self._ranks} {_hash(samples)} {_bits(loss)} {_bits(norm)}"
        before = self._lines.get(step)
        if before is not None:
            return _difference(before, line, elastic=self._elastic)
        self._lines[step] = line
        self._file.write(f"{line}\n".encode())
        return None

    def forget(self, *, after: int) -> None:
        """Cut off the steps after one: on other data or settings they are not done again, but anew."""
        if self.done <= after:
            return
        self._lines = {step: line for step, line in self._lines.items() if step <= after}
        self._file.seek(0)
        kept = 0
        for line in self._file.read().splitlines(keepends=True):
            match = _LINE.match(line)
            if match and int(match[1]) > after:
                break
            kept += len(line)
        self._file.truncate(kept)

    def flush(self) -> None:
        """Bring every line to the disk itself; called before a checkpoint is published."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._file.close()

    @property
    def done(self) -> int:
        """The last step that was ever done."""
        return max(self._lines, default=0)

    def final(self) -> dict[int, str]:
        """The line of every step, in order."""
        return dict(sorted(self._lines.items()))


def _hash(samples: Sequence[str]) -> str:
    return blake2b("\0".join(samples).encode(), digest_size=8).hexdigest()


def _bits(value: float) -> str:
    # There are many bit patterns of NaN, of which hardware may give this one or that.
    return struct.pack(">d", math.nan if math.isnan(value) else value).hex()


def _value(bits: str) -> float:
    return struct.unpack(">d", bytes.fromhex(bits))[0]


def _difference(before: str, now: str, *, elastic: bool) -> str | None:
    step, ranks, samples, *floats = before.split()
    _, ranks_now, samples_now, *floats_now = now.split()
    parts: list[str] = []
    if samples != samples_now:
        parts.append(f"its samples are others (hash {samples} then, {samples_now} now)")
    if elastic or ranks == ranks_now:
        parts += [
            f"its {name} is {_value(b)!r}, where it was {_value(a)!r}"
            for name, a, b in zip(("loss", "gradient norm"), floats, floats_now, strict=True)
            if a != b
        ]
    return f"step {step} was run again and differs: {'; '.join(parts)}" if parts else None
