"""What holds at a given step: stage, learning rate, weights, and where its batch stands in the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pretrain.config import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """One stage and the global steps and positions that are its own."""

    name: str
    stage: Stage
    first: int
    """Global step it begins at."""
    position: int
    """Samples of the data that were used before it."""

    @property
    def last(self) -> int:
        """The global step after its own."""
        return self.first + self.stage.steps

    def position_at(self, step: int) -> int:
        """Samples of the data that were used before a global step of this stage."""
        return self.position + (step - self.first) * self.stage.batch


class Curriculum:
    """The stages of a run on one line of global steps, a pure function of the run."""

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        self.stretches: list[Stretch] = []
        first = position = 0
        for name, stage in stages.items():
            self.stretches.append(Stretch(name=name, stage=stage, first=first, position=position))
            first += stage.steps
            position += stage.steps * stage.batch
        self.steps = first
        """Steps of the whole run."""
        self.samples = position
        """Samples of the whole run, counted as often as they are used."""

    def from_step(self, step: int) -> Iterator[tuple[Stretch, int]]:
        """The stages that are not finished at a global step, each with the step to begin at."""
        for stretch in self.stretches:
            if step < stretch.last:
                yield stretch, max(step, stretch.first)

    def stretch_of(self, step: int) -> Stretch:
        """The stage of a global step; the last one beyond the end."""
        return next((each for each in self.stretches if step < each.last), self.stretches[-1])

    def samples_at(self, step: int) -> int:
        """Samples used before a global step."""
        for stretch in self.stretches:
            if step < stretch.last:
                return stretch.position_at(step)
        return self.samples
