"""The samples that cannot be used: a list, how many a run may lose, and a report that says what to do.

RUN_DIR/quarantine.jsonl holds one JSON object for each sample, however often it is met: source, key, shard,
offset, kind, reason, and the epoch, position and step of the first time; RUN_DIR/quarantine.txt says it for
readers. Only rank zero writes. The slots were masked before: nothing here changes what is trained.

The budgets count from where the list begins. It begins anew where the data were allowed to change (what stood
there is kept as quarantine.1.jsonl, .2, ...: it is of other data), and where it was deleted.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from heapq import nlargest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from datasets.errors import KINDS, UserError
from pretrain.fencing import Records, replace

if TYPE_CHECKING:
    from datasets.sample import Fault

_WAIT = 1000  # samples read before a share of them means anything
_LEAST = 10  # bad samples of a shard before a share of it does
_ALOUD = 3  # samples of each kind that are named on the console, and in the report
_WORST = 20  # shards in the report


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much may be unusable before a run stops: shares of samples (at 0 the first stops it), and steps."""

    overall: float = 0.02
    """Share of the samples read since the list began, once they are 1,000 (at 0: of any)."""
    shard: float = 0.2
    """Share of one shard's samples, once 10 of them are bad (at 0: one)."""
    steps: int = 8
    """Steps in a row that are skipped because a loss, a gradient or an input is not finite."""

    def check(self) -> None:
        """Refuse what is no share, and no number of steps.

        Raises:
            UserError: a share is not within 0 to 1, or there is not one step.
        """
        if self.steps < 1:
            raise UserError(f"--bad.steps is {self.steps}; it must be at least 1")
        for name in ("overall", "shard"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"--bad.{name} {value} is no share: give a number from 0 (none) to 1 (any)")


def put_away(path: Path) -> None:
    """Keep a list and its report under the next free number: the next one begins anew."""
    if path.exists() and path.stat().st_size == 0:
        path.unlink()
        return
    number = 1
    while path.with_suffix(f".{number}{path.suffix}").exists():
        number += 1
    for each in (path, path.with_suffix(".txt")):
        if each.exists():
            each.rename(each.with_suffix(f".{number}{each.suffix}"))


class Bad(Protocol):
    """A sample that cannot be used, as it was met."""

    @property
    def source(self) -> str: ...  # noqa: D102
    @property
    def key(self) -> str: ...  # noqa: D102
    @property
    def position(self) -> int: ...  # noqa: D102
    @property
    def epoch(self) -> int: ...  # noqa: D102
    @property
    def fault(self) -> Fault: ...  # noqa: D102


@dataclass(slots=True)
class _Shard:
    bad: int = 0
    first: dict[str, Any] = field(default_factory=dict)
    """The line of its sample that lies first in it."""


class Quarantine:
    """The list of a run. Lines reach the operating system at once: a killed process loses none."""

    def __init__(self, path: Path, budget: Budget, *, samples_of: Callable[[str, str], int | None]) -> None:
        """Read what stands there; a last line torn by a crash is cut off.

        Args:
            path: the list; the report lies beside it.
            budget: what `verdict` holds against it.
            samples_of: the samples in a shard, by source and shard; None where there is none.
        """
        self._budget = budget
        self._samples_of = cache(samples_of)
        self._report = path.with_suffix(".txt")
        self._known: set[bytes] = set()
        self._kinds: Counter[str] = Counter()
        self._shards: dict[tuple[str, str], _Shard] = {}
        self._met: set[tuple[str, str]] = set()  # shards of which this process met a bad sample
        self._examples: dict[str, list[dict[str, Any]]] = {}
        self._file = Records(path)
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        for line in content[:whole].splitlines():
            if (entry := _entry(line)) is not None:
                self._remember(entry)
        if not self._kinds:
            self._report.unlink(missing_ok=True)  # of a list that was deleted
        self._changed = bool(self._kinds) and not self._report.exists()

    def add(self, masked: Iterable[Bad], *, step: int) -> list[str]:
        """Put those on the list that do not stand there, also from before a restart.

        Args:
            masked: what one step could not use, on all ranks.
            step: optimizer steps done before it.

        Returns:
            What to say aloud: the first few of each kind, and how many there are whenever that doubles.
        """
        aloud: list[str] = []
        for one in masked:
            self._met.add((one.source, one.fault.shard))
            line = {
                "source": one.source, "key": one.key, "shard": one.fault.shard, "offset": one.fault.offset,
                "kind": one.fault.kind, "reason": one.fault.reason,
                "epoch": one.epoch, "position": one.position, "step": step,
            }  # fmt: skip
            before = self._kinds.total()
            if not self._remember(line):
                continue
            self._file.write(json.dumps(line).encode() + b"\n")
            self._changed = True
            if self._kinds[one.fault.kind] <= _ALOUD:
                aloud.append(f"masked sample {one.key}: {one.fault}")
            elif (total := before + 1) >= 16 and total & before == 0:
                counts = ", ".join(f"{count} {kind}" for kind, count in self._kinds.most_common())
                aloud.append(f"{total:,} samples are masked by now ({counts}): {self._file.name} lists them")
        return aloud

    def counts(self) -> dict[str, int]:
        """Samples on the list by kind, the most frequent first."""
        return dict(self._kinds.most_common())

    def verdict(self, *, samples: int, masked: int) -> str | None:
        """Why the run should stop, in a sentence, if it loses too much.

        Args:
            samples: slots of all steps since the list began, this one included.
            masked: how many of them were masked; what is met again in each epoch counts again.
        """
        allowed = self._budget
        enough = samples >= _WAIT or allowed.overall == 0
        if enough and masked > allowed.overall * samples:
            kind = next(iter(self.counts()), "")
            return (
                f"{masked:,} of {samples:,} samples read so far cannot be used (mostly {kind}), more than "
                f"--bad.overall {allowed.overall:g} allows: see {self._report}, mend the data or raise it"
            )
        least = _LEAST if allowed.shard > 0 else 1
        for source, shard in self._met:
            found = self._shards[source, shard]
            size = self._samples_of(source, shard) if found.bad >= least else None
            if size is not None and found.bad > allowed.shard * size:
                return (
                    f"{found.bad:,} of the {size:,} samples of {shard} in {source} cannot be used (the first"
                    f"{_at(found.first)}), more than --bad.shard {allowed.shard:g} allows: see "
                    f"{self._report}, mend the shard, leave it out or raise it"
                )
        return None

    def flush(self) -> None:
        """Bring the list to the disk itself, and the report up to date."""
        os.fsync(self._file.fileno())
        if self._changed:
            replace(self._report, self._text().encode(errors="backslashreplace"))
            self._changed = False

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._file.close()

    def _remember(self, line: dict[str, Any]) -> bool:
        """Count a line; False if its sample was known."""
        # A hash of each key is held, not the key: a billion samples may well have a million bad ones.
        name = blake2b(f"{line['source']}\0{line['key']}".encode(errors="surrogatepass"), digest_size=12)
        if name.digest() in self._known:
            return False
        self._known.add(name.digest())
        self._kinds[line["kind"]] += 1
        examples = self._examples.setdefault(line["kind"], [])
        if len(examples) < _ALOUD:
            examples.append(line)
        shard = self._shards.setdefault((line["source"], line["shard"]), _Shard())
        shard.bad += 1
        if not shard.first or line["offset"] < shard.first["offset"]:
            shard.first = line
        return True

    def _text(self) -> str:
        """The report."""
        lines = [f"{self._kinds.total():,} samples cannot be used: their slots are masked.", ""]
        lines += [f"{count:9,}  {kind}: {KINDS.get(kind, '')}" for kind, count in self.counts().items()]
        lines += ["", "The shards that lose most:", ""]
        shards = [name for name in self._shards if name[1]]
        lines += map(self._row, nlargest(_WORST, shards, key=lambda name: self._shards[name].bad))
        lines += ["", "Examples:", ""]
        for kind, examples in self._examples.items():
            lines += [f"{kind:>11}  {one['key']}{_at(one)}" for one in examples]
        return "\n".join([*lines, "", _WAY_OUT.format(budget=self._budget)])

    def _row(self, name: tuple[str, str]) -> str:
        """What a shard loses, and where to look."""
        (source, shard), found = name, self._shards[name]
        size = self._samples_of(source, shard)
        of = f" of {size:,} ({found.bad / size:.1%})" if size else ""
        return f"{found.bad:9,}{of}  {shard} in {source}, the first{_at(found.first)}"


def _at(line: dict[str, Any]) -> str:
    """Where a sample lies and what is wrong with it."""
    place = f" at byte {line['offset']}" if line["offset"] >= 0 else ""
    return f"{place}: {line['reason']}"


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line of the list; None for one that a crash of the machine or an editor spoiled."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    fields = {"source", "key", "shard", "offset", "kind", "reason"}
    return entry if isinstance(entry, dict) and fields <= entry.keys() else None


_WAY_OUT = """What can be done:

* `python -m datasets.check SHARDS` reads every shard again and names those that are no whole tar file or are
  not as they were indexed (fetch them again). It decodes nothing: what is whole and as it was indexed, but no
  image or text, was never right, and only this list names it.
* A shard that is mostly bad can be left out of the source: name the others.
* If the loss is acceptable, allow it: --bad.shard (now {budget.shard:g}) for one shard, --bad.overall (now
  {budget.overall:g}) for all samples.
* Once shards were mended, go on with --allow-changed (behind a manifest, index them again before): the list
  begins anew and both budgets count from there. Where that brought back the very bytes that were indexed,
  nothing has changed for the run: delete quarantine.jsonl instead, to the same effect.
"""
