"""Everything that is built before the first step, and what changes while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from datasets.loader import Feed
from datasets.source import Source
from datasets.tokens import Tokenizer
from pretrain.clock import Clock
from pretrain.config import Run
from pretrain.curriculum import Curriculum
from pretrain.distributed import Ranks
from pretrain.ema import Ema
from pretrain.flight import Saver
from pretrain.health import Health
from pretrain.ledger import Ledger
from pretrain.pretrainer import Pretrainer
from pretrain.quarantine import Quarantine
from pretrain.rundir import RunDir
from pretrain.sinks import Fanout, Sink
from pretrain.starts import Starts
from pretrain.state import Standing
from pretrain.step import Setup, StepReport
from pretrain.stopwatch import Stopwatch


@dataclass(kw_only=True)
class Training:
    """What the loop works with, built by `pretrain.launch` in the order data flows."""

    run: Run
    feeds: Sequence[Feed]
    """The mixture that is trained on."""
    val: Source | None
    """What the model is judged on, where it is not the built-in scenes."""
    tokenizer: Tokenizer
    pretrainer: Pretrainer
    setup: Setup
    """The pretrainer as it is wrapped, and how it is run."""
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    """The averages of the weights, which are what is judged; None where a stage has none."""
    curriculum: Curriculum
    stage: str
    """The stage that is trained."""
    alone: bool = False
    """Whether this start ends with it, whatever stages follow."""
    ranks: Ranks
    rundir: RunDir
    standing: Standing
    health: Health
    """How the data come."""
    stopwatch: Stopwatch
    """What the time of a step is spent on."""
    sink: Sink = field(default_factory=Fanout)
    """Rank zero's; the others tell no one."""
    ledger: Ledger | None = None
    """Rank zero's."""
    starts: Starts = field(default_factory=lambda: Starts(restarts=0, lost_steps=0))
    """What interruptions have cost so far, as rank zero knows."""
    clock: Clock = field(default_factory=Clock)
    pending: list[tuple[int, Tensor, StepReport]] = field(default_factory=list)
    """Steps done whose numbers were not read from the device yet: (step, sample ids, report)."""
    asked: Callable[[], bool] = lambda: False
    """Whether this rank was asked to stop."""
    hurried: bool = False
    """Whether a scheduler is about to end the process."""
    quarantine: Quarantine | None = None
    """The samples that could not be read; rank zero's."""
    saver: Saver = field(init=False)
    """Writes the checkpoints."""

    def __post_init__(self) -> None:
        cadence = self.run.cadence
        self.saver = Saver(
            self.ranks,
            self.rundir.checkpoints,
            keep=cadence.keep,
            keep_every=cadence.keep_every,
            ends=self.curriculum.ends().values(),
            note=lambda sentence: self.sink.note(sentence),
        )
