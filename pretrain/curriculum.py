"""What holds at a given step: stage, sizes, and where its batch stands in the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from datasets.errors import UserError
from pretrain.bystep import held_at
from pretrain.stage import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Steps of one stage in which resolution, batch and micro-batches stay, on the line of global steps."""

    name: str
    """Of the stage."""
    stage: Stage
    begins: int
    """Global step the stage begins at."""
    first: int
    """Global step this stretch begins at."""
    last: int
    """The global step after its own."""
    position: int
    """Samples of the data that were used before it."""
    batch: int
    micro_batches: int
    resolution: int

    @property
    def ends(self) -> int:
        """The global step after the stage."""
        return self.begins + self.stage.steps

    def position_at(self, step: int) -> int:
        """Samples of the data that were used before a global step of this stretch."""
        return self.position + (step - self.first) * self.batch


class Curriculum:
    """The stages of a run on one line of global steps, a pure function of the run."""

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        self.stages = dict(stages)
        self.stretches: list[Stretch] = []
        begins = position = 0
        for name, stage in stages.items():
            changes = [step for step in stage.changes() if step < stage.steps]
            for start, stop in zip(changes, [*changes[1:], stage.steps], strict=True):
                stretch = Stretch(
                    name=name,
                    stage=stage,
                    begins=begins,
                    first=begins + start,
                    last=begins + stop,
                    position=position,
                    batch=held_at(stage.batch, start),
                    micro_batches=held_at(stage.micro_batches, start),
                    resolution=held_at(stage.resolution, start),
                )
                self.stretches.append(stretch)
                position += (stop - start) * stretch.batch
            begins += stage.steps
        self.steps = begins
        """Steps of the whole run."""
        self.samples = position
        """Samples of the whole run, counted as often as they are used."""

    def of_stage(self, name: str) -> list[Stretch]:
        """The stretches of a stage.

        Raises:
            UserError: there is no such stage; names the nearest.
        """
        if name not in self.stages:
            near = get_close_matches(name, self.stages, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; it has {', '.join(self.stages)}"
            raise UserError(f"this run has no stage {name!r}{hint}")
        return [each for each in self.stretches if each.name == name]

    def ends(self) -> dict[str, int]:
        """The global step after each stage."""
        return {each.name: each.ends for each in self.stretches}

    def stretch_of(self, step: int) -> Stretch:
        """The stretch of a global step; the last one beyond the end."""
        return next((each for each in self.stretches if step < each.last), self.stretches[-1])

    def samples_at(self, step: int) -> int:
        """Samples used before a global step."""
        return self.samples if step >= self.steps else self.stretch_of(step).position_at(step)

    def finished_at(self, step: int) -> dict[str, int]:
        """The stages that are finished at a global step, each with its number of steps."""
        return {
            name: stage.steps for name, stage in self.stages.items() if self.of_stage(name)[0].ends <= step
        }
