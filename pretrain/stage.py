"""One stage of a run: what is trained for a number of steps, on what, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from datasets.errors import UserError
from datasets.views import Augment
from datasets.weights import Weight, check_weight
from pretrain.bystep import ByStep, check_by_step, held_at, points_of
from pretrain.optim import Optim
from pretrain.trainable import check_trainable


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of steps with its own data, objectives, sizes and optimizer settings.

    Sizes may change inside it: a number, or `((0, 224), (30_000, 490))`, from those steps of the stage on.
    Optimizer state and step go on across such a change.
    """

    steps: int = 1000
    """Optimizer steps of this stage."""
    batch: ByStep = 128
    """Samples of a global batch, over all ranks and micro-batches: a number, or STEP VALUE from steps on."""
    micro_batches: ByStep = 1
    """Pieces a rank works through its share in: less memory, the same gradient; a number, or STEP VALUE."""
    resolution: ByStep = 64
    """Side of the images in pixels: a number, or STEP VALUE from those steps of the stage on."""
    sources: dict[str, Weight] = field(default_factory=dict[str, Weight])
    """The sources that are read, with their weights in this stage; none for all, at their own weights.
    Points of a line count the steps of the stage."""
    objectives: dict[str, Weight] = field(default_factory=dict[str, Weight])
    """The objectives that are minimised, with their weights in this stage; none for all, at their own."""
    trainable: dict[str, float] = field(default_factory=dict[str, float])
    """Patterns of parameter names, such as `image.*`, and what multiplies the learning rate there: 0 freezes.
    The last pattern that fits counts; what none fits trains at 1."""
    optim: Optim = field(default_factory=Optim)
    """Optimizer settings and learning-rate schedule of this stage."""
    moments: Literal["kept", "fresh"] = "kept"
    """Whether the optimizer goes on with what it knows from the stage before, or begins anew."""
    ema: float = 0.0
    """Decay of the moving average of the weights that is judged and exported; 0 for none."""
    augment: Augment = field(default_factory=Augment)
    """The random view of a photo; built-in scenes are never cropped or flipped."""

    def check(self, name: str) -> None:
        """Refuse what cannot be trained.

        Raises:
            UserError: names the flag and the least value.
        """
        flag = f"--stages.{name}"
        if self.steps < 1:
            raise UserError(f"{flag}.steps is {self.steps}; it must be at least 1")
        for key in ("batch", "micro_batches", "resolution"):
            check_by_step(getattr(self, key), f"{flag}.{key.replace('_', '-')}", steps=self.steps)
        self.optim.check(f"{flag}.optim", steps=self.steps)
        for step in self.changes():
            batch, micro_batches = held_at(self.batch, step), held_at(self.micro_batches, step)
            if batch < micro_batches:
                raise UserError(f"{flag}.batch is {batch}, too few samples for {micro_batches} micro-batches")
        for key, weights in {"sources": self.sources, "objectives": self.objectives}.items():
            for one, weight in weights.items():
                check_weight(weight, f"{flag}.{key}.{one}")
        check_trainable(self.trainable, f"{flag}.trainable")
        if not 0 <= self.ema < 1:
            raise UserError(f"{flag}.ema is {self.ema}; a decay lies in 0..1, below 1")

    def changes(self) -> list[int]:
        """The steps of the stage at which a size is another than before, the first step among them."""
        sizes = (self.batch, self.micro_batches, self.resolution)
        return sorted({first for size in sizes for first, _ in points_of(size)})
