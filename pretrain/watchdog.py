"""A run that hangs must end, and say where: Slurm would keep its GPUs for ever.

    RUN_DIR/heartbeats/rank-N    what rank N was doing, written by a thread of its own every few seconds
    RUN_DIR/stacks/rank-N.txt    where each of its threads stood when the run was given up

Ranks wait for each other in every step, so that one that hangs holds up all. Each then sees that its step
does not end, writes down its stacks, names the ranks that are behind or give no sign of life, and ends hard
with code 70, on which it is started again. What is no step has more time: building, the first step, in which
all is compiled, a checkpoint, and an evaluation between two of its batches. Time in which this process was
stopped does not count. What holds the interpreter's lock for ever is seen by the other ranks alone.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Self

from datasets.errors import UserError
from pretrain import fencing, verdict
from pretrain.place import place_here

HUNG, FENCED = 70, 1
_TIMES = 10
"""How many times the median step a step may take."""
_TICKS = 12
"""How often the thread looks within the time that a step may take."""
_LONGEST_TICK = 5.0


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a step may take before the run is given up as hanging, and started again by the supervisor."""

    least: float = 60.0
    """Seconds that any step may take; beyond it ten times the median, and what a remote read may take."""
    most: float = 3600.0
    """Seconds for what is no step, if that is more: building, the first step, a checkpoint, a batch of an
    evaluation."""

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: one is no time.
        """
        for name, seconds in (("least", self.least), ("most", self.most)):
            if not 0 < seconds < float("inf"):
                raise UserError(f"--watchdog.{name} {seconds:g} is no time: give seconds above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """A sign of life of a rank."""

    token: str
    """Of the start that it belongs to."""
    node: str
    marks: int
    """Points of the loop that it has passed in this stage; the same where ranks stand at the same place."""
    doing: str
    time: float
    """Unix seconds."""
    stage: str = ""
    """In which it stands."""


@dataclass
class _Standing:
    """Where the main thread stands, as it says itself."""

    marks: int = 0
    doing: str = "building"
    timed: bool = False
    since: float = field(default_factory=time.monotonic)


class Watchdog:
    """Watches one rank, and through their signs of life the others. Entered by the thread that trains."""

    def __init__(
        self,
        out: Path,
        *,
        rank: int,
        world: int,
        least: float,
        most: float = Patience.most,
        stage: str = "",
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """Nothing is watched yet.

        Args:
            out: RUN_DIR.
            rank: whose steps are watched.
            world: how many there are.
            least: seconds that any step may take.
            most: seconds for what is no step.
            stage: which is trained: the next one begins to count anew.
            end: ends the process, with a code.
        """
        self._out, self._rank, self._world, self._end = out, rank, world, end
        self._least, self._most, self._stage = least, most, stage
        self._token = fencing.token_of(out)
        self._node = place_here().node
        self._tick = min(least / _TICKS, _LONGEST_TICK)
        self._standing = _Standing()
        self._last_step: float | None = None
        self._steps: deque[float] = deque(maxlen=50)
        self._seen: dict[int, tuple[Beat, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def mark(self, doing: str, *, timed: bool) -> None:
        """The training thread passes a point of the loop.

        Args:
            doing: what it does now, in words.
            timed: whether that has to end soon.
        """
        before = self._standing
        self._standing = _Standing(before.marks + 1, doing, timed)  # one reference: no lock is needed
        if not timed:
            self._last_step = None

    def moved(self) -> None:
        """What it does goes on, and its time counts anew."""
        self._standing = replace(self._standing, since=time.monotonic())

    def stepped(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        if self._last_step is not None:
            self._steps.append(now - self._last_step)
        self._last_step = now

    @property
    def limit(self) -> float:
        """Seconds that a step may take now."""
        return max(self._least, _TIMES * median(list(self._steps) or [0.0]))

    def _watch(self) -> None:
        looked, stopped = time.monotonic(), 0.0
        current = self._standing
        while not self._stop.wait(self._tick):
            now = time.monotonic()
            if self._standing is not current:
                current, stopped = self._standing, 0.0
            # Nothing of this process ran in between, neither the thread that trains.
            stopped += max(0.0, now - looked - 2 * self._tick)
            if now - looked > 3 * self._tick:
                self._seen.clear()
            looked = now
            try:
                alive = self._beat(current)
                waited = now - current.since - stopped
                if waited > (self.limit if current.timed else max(self._most, self.limit)):
                    longer = "" if current.timed else ", longer than --watchdog.most"
                    self._give_up(f"{current.doing} for {waited:.0f} s{longer}", self._stale(current))
                elif not current.timed and alive and (silent := self._silent(now)):
                    self._give_up(current.doing, silent)
            except fencing.FencedError as error:
                sys.stderr.write(f"rank {self._rank}: {error}\n")
                sys.stderr.flush()
                self._end(FENCED)
                return

    def _beat(self, standing: _Standing) -> bool:
        """Give a sign of life; whether that was possible.

        Raises:
            FencedError: this process is of an earlier start.
        """
        beat = Beat(
            token=self._token,
            node=self._node,
            marks=standing.marks,
            doing=standing.doing,
            time=round(time.time(), 3),
            stage=self._stage,
        )
        path = self._file(self._rank)
        try:
            path.parent.mkdir(exist_ok=True)
            fencing.replace(path, json.dumps(asdict(beat)).encode(), lasting=False)
        except OSError:  # a full disk stops no training; nobody is judged by what cannot be written
            self._seen.clear()
            return False
        return True

    def _file(self, rank: int) -> Path:
        return self._out / "heartbeats" / f"rank-{rank}"

    def _read(self, rank: int) -> Beat | None:
        """The last sign of life of a rank in this stage of this start."""
        try:
            beat = Beat(**json.loads(self._file(rank).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return beat if (beat.token, beat.stage) == (self._token, self._stage) else None

    def _silent(self, now: float) -> list[str]:
        """Ranks that gave no new sign of life for long, as this one saw it: rank zero all, the others it."""
        found: list[str] = []
        for rank in range(1, self._world) if self._rank == 0 else [0]:
            beat = self._read(rank)
            if beat is None:
                continue
            before, since = self._seen.get(rank, (None, now))
            if before is None or before.time != beat.time:
                self._seen[rank] = (beat, now)
            elif now - since > 2 * self._least:
                found.append(_named(rank, beat, f"no sign of life for {now - since:.0f} s"))
        return found

    def _stale(self, standing: _Standing) -> list[str]:
        """Ranks that are silent, or else those that are behind the others."""
        beats = {rank: beat for rank in range(self._world) if (beat := self._read(rank)) is not None}
        newest = max((beat.time for beat in beats.values()), default=0.0)
        silent = {rank: newest - beat.time for rank, beat in beats.items()}
        old = [
            _named(rank, beats[rank], f"no sign of life for {age:.0f} s")
            for rank, age in silent.items()
            if age > max(4 * self._tick, 1.0)
        ]
        furthest = max((beat.marks for beat in beats.values()), default=standing.marks)
        behind = [_named(rank, beat, beat.doing) for rank, beat in beats.items() if beat.marks < furthest]
        return old or behind

    def _give_up(self, what: str, stale: list[str]) -> None:
        """Write down where all threads stand, say so, and end."""
        if self._stop.is_set():
            return
        stacks = self._out / "stacks" / f"rank-{self._rank}.txt"
        with suppress(OSError):
            stacks.parent.mkdir(exist_ok=True)
            with stacks.open("w") as file:
                file.write(f"rank {self._rank} on {self._node}, {time.ctime()}: {what}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        who = "; ".join(stale[:8]) or "no rank is behind the others"
        reason = f"the run hangs ({what}): {who}; {stacks.parent} has the stacks of all that answer"
        sys.stderr.write(f"rank {self._rank}: {reason}\n")
        sys.stderr.flush()
        verdict.give(verdict.Verdict(code=HUNG, reason=reason, rank=self._rank))
        # As soon as one has ended the launcher ends the others: they may write down their stacks first.
        self._stop.wait(3 * self._tick)
        self._end(HUNG)
        self._stop.set()


def _named(rank: int, beat: Beat, words: str) -> str:
    return f"rank {rank} on {beat.node} ({words})"
