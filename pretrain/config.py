"""A run as one immutable value. Components own their settings; this file only composes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from torch import nn

from datasets.errors import UserError
from datasets.order import Shuffle
from datasets.remote.fetch import Remote
from datasets.sources import SourceConfig
from datasets.weights import turns, weight_at, weights_in
from objectives import kind_of, objective_class
from objectives.base import Objective
from pretrain.bystep import held_at
from pretrain.coupled import Pool
from pretrain.elastic import check_lanes
from pretrain.parallel import Spread
from pretrain.precision import Precision
from pretrain.quarantine import Budget
from pretrain.sinks.mirrored import Wandb
from pretrain.stage import Stage
from pretrain.watchdog import Patience
from pretrain.zoo.models import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """How often something happens beside training."""

    report: int = 20
    """Steps between two lines of metrics."""
    checkpoint: int = 200
    """Steps between two checkpoints; the last step always makes one."""
    keep: int = 2
    """Checkpoints that stay on disk: the newest ones that verify."""
    keep_every: int = 0
    """Those of steps that are multiples of it stay too, as do those at the end of a stage; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class Eval:
    """How the model is judged beside training, on --val; always after the last step."""

    every: int = 0
    """Steps between two evaluations; 0 for the last step only."""
    classes: str = ""
    """`imagenet`, or a text file with one class name a line, where --val holds class labels; empty for the
    names that the labels are."""
    limit: int = 0
    """Samples of --val that are looked at, the same ones each time; 0 for all."""
    batch: int = 256
    """Images that a rank encodes at a time."""
    rerank: int = 16
    """With an objective that tells matching pairs from others: the nearest answers of a query of retrieval
    that it puts into a new order; 0 for none."""

    def check(self, on: str, *, matches: bool) -> None:
        """Refuse what would change nothing.

        Args:
            on: the data that is evaluated on; empty for none.
            matches: whether an objective tells matching pairs from others.

        Raises:
            UserError: names the flag.
        """
        idle = {
            "": "of which there is none: name one, or leave it out",
            "scenes": "and scenes have test sets of their own: leave it out",
        }
        for flag, value in {"--eval.limit": self.limit, "--eval.classes": self.classes}.items():
            if value and on in idle:
                raise UserError(f"{flag} {value} is for --val, {idle[on]}")
        if self.rerank not in (0, Eval.rerank) and not matches:
            raise UserError(
                f"--eval.rerank {self.rerank} needs an objective that tells matching pairs from others: add "
                "one, as --objectives itc,itm, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides a run. Written to RUN_DIR/run.yaml; `--recipe RUN_DIR/run.yaml` repeats it."""

    sources: dict[str, SourceConfig] = field(default_factory=lambda: {"data": SourceConfig()})
    """What is trained on, by name; --data chooses them."""
    shuffle: Shuffle = field(default_factory=Shuffle)
    """The order of samples."""
    pool: Pool = "source"
    """Whose samples are contrasted: those of one source, or of all that feed the objective."""
    val: str = ""
    """Data to evaluate on, written like --data; `scenes` has its own test sets."""
    vocabulary: int = 4096
    """Largest vocabulary of a tokenizer trained on the data's own captions."""
    model: ModelConfig
    """The encoders; --model chooses the kind."""
    objectives: dict[str, Objective.Config]
    """What is minimised, by name; --objectives chooses them."""
    stages: dict[str, Stage] = field(default_factory=lambda: {"one": Stage()})
    """Stages in the order they are trained."""
    precision: Precision = field(default_factory=Precision)
    """Arithmetic."""
    spread: Annotated[Spread, tyro.conf.arg(name="")] = field(default_factory=Spread)
    """How it is spread over processes and memory; flags without a prefix: --parallel fsdp."""
    deterministic: Literal["resumed", "elastic"] = "resumed"
    """How far the same command gives the same bits: killed and resumed on as many ranks, or elastic, on any
    number of ranks that divides --shuffle.lanes. Elastic works lane by lane, whatever the ranks."""
    cadence: Cadence = field(default_factory=Cadence)
    """Reports and checkpoints."""
    eval: Eval = field(default_factory=Eval)
    """Evaluations."""
    wandb: Wandb = field(default_factory=Wandb)
    """The copy in W&B."""
    loader_threads: int = 2
    """Threads of each rank that read and decode ahead."""
    remote: Remote = field(default_factory=Remote)
    """How shards of a network are fetched."""
    watchdog: Patience = field(default_factory=Patience)
    """When a run that hangs is given up."""
    bad: Budget = field(default_factory=Budget)
    """How many samples may be unreadable, and steps not finite, before the run stops."""
    seed: int = 0
    """Key of the order, the views and the initial weights."""

    def check(self) -> None:
        """Refuse values that no run can have.

        Raises:
            UserError: one sentence that names the flag.
        """
        if not self.objectives:
            raise UserError("a run needs at least one objective: --objectives itc,lm")
        if not self.stages:
            raise UserError("a run needs at least one stage")
        self.model.check()
        if self.deterministic == "elastic":
            self._check_elastic()
        self.wandb.wanted()
        for name, objective in self.objectives.items():
            if hasattr(nn.ModuleDict, name):
                raise UserError(
                    f"an objective cannot be called {name!r}: torch uses the name; choose another"
                )
            objective.check(f"--objectives.{name}")
        self._check_sources()
        self._check_stages()
        self.precision.check()
        self.spread.check(
            {name: stage.optim.kind for name, stage in self.stages.items()},
            elastic=self.deterministic == "elastic",
        )
        self.remote.check()
        self.watchdog.check()
        self.bad.check()
        least = {
            "--cadence.report": (self.cadence.report, 1),
            "--cadence.checkpoint": (self.cadence.checkpoint, 1),
            "--eval.every": (self.eval.every, 0),
            "--eval.limit": (self.eval.limit, 0),
            "--eval.batch": (self.eval.batch, 1),
            "--eval.rerank": (self.eval.rerank, 0),
            "--cadence.keep-every": (self.cadence.keep_every, 0),
            "--cadence.keep": (self.cadence.keep, 2),  # the newest may be cut short by a crash
            "--seed": (self.seed, 0),
            "--precision.threads": (self.precision.threads, 0),
            "--loader-threads": (self.loader_threads, 1),
        }
        for flag, (value, bound) in least.items():
            if value < bound:
                raise UserError(f"{flag} is {value}; it must be at least {bound}")
        kinds = [objective_class(kind_of(each)) for each in self.objectives.values()]
        matches = any(hasattr(each, "match_logit") for each in kinds)
        self.eval.check(self.val or ("scenes" if self.data == "scenes" else ""), matches=matches)

    def _check_elastic(self) -> None:
        for stage in self.stages.values():
            for step in stage.changes():
                check_lanes(
                    held_at(stage.batch, step), held_at(stage.micro_batches, step), self.shuffle.lanes
                )
        if self.precision.parameters == "bf16":
            raise UserError(
                "--deterministic elastic adds gradients up in float32: leave --precision.parameters bf16 out"
            )
        for name, objective in self.objectives.items():
            if getattr(objective, "wire", "exact") != "exact":
                raise UserError(
                    "--deterministic elastic computes what contrasts on every rank, of embeddings as they "
                    f"are: leave --objectives.{name}.wire out"
                )

    def _check_sources(self) -> None:
        if not self.sources:
            raise UserError("this recipe names no data: --data scenes, or --data 'shards/*.tar'")
        self.shuffle.check("--shuffle")
        for name, source in self.sources.items():
            if not name.isidentifier():
                raise UserError(
                    f"a source cannot be called {name!r}: give it a name of letters, digits and _"
                )
            source.check(f"--sources.{name}")
            unknown = [each for each in source.objectives if each not in self.objectives]
            if unknown:
                raise UserError(
                    f"--sources.{name}.objectives names {unknown[0]!r}, which this run does not have; it has "
                    f"{', '.join(self.objectives)}"
                )

    def _check_stages(self) -> None:
        before: Stage | None = None
        for name, stage in self.stages.items():
            stage.check(name)
            known = {"sources": self.sources, "objectives": self.objectives}
            for key, given in {"sources": stage.sources, "objectives": stage.objectives}.items():
                for unknown in given.keys() - known[key].keys():
                    raise UserError(
                        f"--stages.{name}.{key} names {unknown!r}, which this run does not have; it has "
                        f"{', '.join(known[key])}"
                    )
            kept = stage.moments == "kept"
            if kept and before is not None and before.optim.kind != stage.optim.kind:
                raise UserError(
                    f"--stages.{name}.optim.kind {stage.optim.kind} cannot go on with what "
                    f"{before.optim.kind} kept: take --stages.{name}.moments fresh, or the same kind"
                )
            before = stage
        begins = 0
        for name, stage in self.stages.items():
            own = {key: each.weight for key, each in self.sources.items()}
            weights = weights_in(stage.sources, own, begins=begins)
            ends = begins + stage.steps
            steps = {step for each in weights.values() for step in turns(each) if begins <= step < ends}
            for step in sorted({begins, ends - 1, *steps}):  # between these, weights are straight lines
                if not any(weight_at(weight, step) > 0 for weight in weights.values()):
                    raise UserError(
                        f"no source has a weight above zero at step {step}, in stage {name}: raise a "
                        f"--sources.NAME.weight or one of --stages.{name}.sources"
                    )
            begins = ends

    @property
    def data(self) -> str:
        """What is trained on, in one line."""
        return ",".join(source.data for source in self.sources.values())
