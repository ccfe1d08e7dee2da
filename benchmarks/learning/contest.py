"""One data set: what is trained on it, in which order, and what of it is done already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.recall import Examination, write_initial
from benchmarks.learning.systems import (
    ENVIRONMENT,
    PRECISIONS,
    Job,
    Settings,
    medley,
    open_clip_train,
)
from benchmarks.learning.watch import Training, watch
from datasets.atomic import replace
from pretrain.optim import Optim
from pretrain.recipes import laptop

SYSTEMS = ("open_clip", "same_steps", "same_budget")
"""Each seed trains in this order: the second has the steps of the first, the third its CPU time."""
MUON = "muon"
"""Once more in the first one's CPU time, with the optimizer that Medley has by default."""
_CALIBRATION = 12  # steps between the two checkpoints that tell the peer's speed


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Everything on one data set. What is done is in files of `folder`, and is not done again."""

    settings: Settings
    python: Path
    """The peer's interpreter."""
    folder: Path
    train: str
    pairs: str
    """`train`, as the peer reads it."""
    examination: Examination

    def calibration(self) -> dict[str, Any]:
        """In which precision the peer is faster, and how fast."""
        return self._kept("calibration", self._calibrate)

    def run(self, system: str, *, seed: int) -> dict[str, Any]:
        """Train a system to its end: its marks, each with step, CPU seconds and recall."""
        return self._kept(f"{system}-seed{seed}", lambda: self._run(system, seed))

    def _calibrate(self) -> dict[str, Any]:
        measured: dict[str, Any] = {}
        for precision in PRECISIONS:
            job = self._job(_CALIBRATION, seed=0, marks=2)
            training = open_clip_train(job, python=self.python, pairs=self.pairs, precision=precision)
            measured[precision] = pace(self._watch(training))
        best = min(measured, key=lambda precision: measured[precision]["step_seconds"])
        return {"precision": best, "measured": measured}

    def _calibrate_muon(self) -> dict[str, float]:
        job = self._job(_CALIBRATION, seed=0, marks=2)
        return pace(self._watch(medley(job, data=self.train, optim=_muon())))

    def _run(self, system: str, seed: int) -> dict[str, Any]:
        job = self._job(self._every(system), seed=seed, marks=self.settings.marks)
        if system == "open_clip":
            precision = self.calibration()["precision"]
            training = open_clip_train(job, python=self.python, pairs=self.pairs, precision=precision)
        else:
            optim = _muon() if system == MUON else self.settings.optim
            training = medley(job, data=self.train, optim=optim)
        spent = {0: 0.0, **self._watch(training)}
        weights = {0: job.initial, **training.weights}
        marks = [
            {"step": step, "cpu_seconds": seconds, **self.examination.recall(weights[step])}
            for step, seconds in spent.items()
        ]
        return {"system": system, "seed": seed, "command": training.command, "marks": marks}

    def _every(self, system: str) -> int:
        """Steps between two checkpoints, so that seed 0 fills its time; the same for every seed."""
        if system == "same_steps":
            return self._every("open_clip")
        if system == "open_clip":
            calibration, seconds = self.calibration(), self.settings.cpu_seconds
            known = calibration["measured"][calibration["precision"]]
        else:
            seconds = max(self._spent("open_clip").values())
            known = pace(self._spent("same_steps"))
        if system == MUON:
            known = self._kept("muon-calibration", self._calibrate_muon)
        return max(1, int((seconds - known["start_seconds"]) / known["step_seconds"]) // self.settings.marks)

    def _job(self, every: int, *, seed: int, marks: int) -> Job:
        """A job in an empty folder of its own, with its initial weights."""
        running = self.folder / "running"
        shutil.rmtree(running, ignore_errors=True)
        running.mkdir(parents=True)
        initial = running / "initial.safetensors"
        write_initial(initial, model=self.settings.model, seed=seed)
        return Job(
            settings=self.settings, every=every, marks=marks, seed=seed, initial=initial, folder=running
        )

    def _spent(self, system: str) -> dict[int, float]:
        """CPU seconds by step of seed 0."""
        return {mark["step"]: mark["cpu_seconds"] for mark in self.run(system, seed=0)["marks"][1:]}

    def _watch(self, training: Training) -> dict[int, float]:
        return watch(training, environment=ENVIRONMENT, log=self.folder / "running" / "log")

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if not path.exists():
            print(f"{self.folder.name}: {name}", flush=True)
            replace(path, json.dumps(make(), indent=1).encode())
            shutil.rmtree(self.folder / "running")
        return json.loads(path.read_bytes())


def pace(spent: dict[int, float]) -> dict[str, float]:
    """Seconds of a step and before the first one, from CPU time by step."""
    (first, begun), *_, (last, ended) = spent.items()
    step = (ended - begun) / (last - first)
    return {"step_seconds": step, "start_seconds": begun - step * first}


def _muon() -> Optim:
    """Medley as it comes: what the recipe that is its default says."""
    return laptop.recipe().stages["one"].optim
