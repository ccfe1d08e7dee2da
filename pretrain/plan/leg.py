"""What a stretch of steps of one batch and one resolution takes, from a few steps on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Literal

from datasets.errors import UserError
from datasets.tokens import Tokenizer
from datasets.weights import weight_at, weights_in
from pretrain.config import Run
from pretrain.curriculum import Stretch
from pretrain.plan.gpus import ROOM, gpu_called
from pretrain.plan.inputs import Input, feeding, micro_batches
from pretrain.plan.trial import Found, Setting, Trial
from pretrain.plan.wanted import Wanted

_TRIED = 3
"""Micro-batches of a rank that are run; what more of them take follows from these."""
_LOOKED = 256
"""Steps of a stretch at which the weights of sources are looked at."""
Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """Of one rank where nothing else is said."""

    name: str
    steps: int
    batch: int
    """Samples of the global batch."""
    resolution: int
    pieces: int
    """Micro-batches of a rank."""
    micro_batch: int
    """Samples of one."""
    ran: int
    """Samples of one on paper, where the share of each source is rounded up."""
    shares: Mapping[str, float]
    """Of the batch, by source: the mean over all steps."""
    found: Found
    """With the run's own way to spread."""
    peaks: Mapping[str, Mapping[str, float] | str]
    """By way to spread, the bytes alive at once by cause, or why it is not possible."""
    largest: int
    """Samples of a micro-batch that fits the GPU; 0 for none."""

    @property
    def flops(self) -> float:
        """The model's, in a step of this rank: those of paper for the samples that a step has."""
        on_paper = self.found.flops.get("forward", 0) + self.found.flops.get("backward", 0)
        return on_paper * self.micro_batch / self.ran

    @property
    def samples(self) -> int:
        """Of all steps and ranks."""
        return self.steps * self.batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Paperwork:
    """What all legs of a plan have in common. They are tried inside one `pretended`."""

    run: Run
    wanted: Wanted
    tokenizer: Tokenizer
    inputs: Sequence[Input]
    _known: dict[tuple[int, Parallel, int, int], Found] = field(default_factory=dict)
    _trials: dict[tuple[str, Parallel], Trial] = field(default_factory=dict)

    def leg(self, stretch: Stretch) -> Leg:
        """Try a step of a stretch in all the ways that the plan tells of.

        Raises:
            UserError: the batch cannot be shared out, or the model not be built on paper.
        """
        pieces = self._pieces(stretch)
        each = stretch.batch // (self.wanted.gpus * pieces)
        own = self.run.spread.parallel
        found = self.step(stretch)
        shares = self._shares(stretch)
        ran = sum(_rounded(shares, each).values())
        peaks: dict[str, Mapping[str, float] | str] = {own: found.bytes}
        for other in ("ddp", "fsdp") if self.wanted.gpus > 1 else ():
            if other != own:
                peaks[other] = self._refused(stretch, other) or self._other(
                    stretch, other, each, pieces, found
                )
        return Leg(
            name=stretch.name,
            steps=stretch.last - stretch.first,
            batch=stretch.batch,
            resolution=stretch.resolution,
            pieces=pieces,
            micro_batch=each,
            ran=ran,
            shares=shares,
            found=found,
            peaks=peaks,
            largest=self._largest(found, ran),
        )

    def step(self, stretch: Stretch) -> Found:
        """One step of a rank, spread as the run says.

        Raises:
            UserError: the batch cannot be shared out, or the model not be built on paper.
        """
        pieces = self._pieces(stretch)
        each = stretch.batch // (self.wanted.gpus * pieces)
        return self._tried(stretch, self.run.spread.parallel, each, pieces)

    def _pieces(self, stretch: Stretch) -> int:
        """Micro-batches of a rank."""
        gpus, lanes = self.wanted.gpus, self.run.shuffle.lanes
        if self.run.deterministic == "elastic" and gpus > 1:
            raise UserError(
                "--plan has no numbers, and ranks of --deterministic elastic send theirs piece by piece: "
                "leave that out, or plan for --gpus 1"
            )
        if len(self.inputs) > 1 and lanes % gpus:
            raise UserError(
                f"--gpus {gpus} do not divide --shuffle.lanes {lanes}, in parts of which sources are mixed: "
                "choose as many lanes as GPUs, or a multiple"
            )
        if stretch.batch % gpus:
            near = max(1, round(stretch.batch / gpus)) * gpus
            raise UserError(
                f"--gpus {gpus} do not divide --stages.{stretch.name}.batch {stretch.batch}: "
                f"take a batch of {near}"
            )
        own = stretch.batch // gpus
        pieces = lanes if self.run.deterministic == "elastic" else stretch.micro_batches
        if own % pieces:
            raise UserError(
                f"--stages.{stretch.name}.micro-batches {pieces} do not divide the {own} samples that each "
                f"of {gpus} GPUs has of a batch of {stretch.batch}"
            )
        return pieces

    def _tried(self, stretch: Stretch, parallel: Parallel, each: int, pieces: int) -> Found:
        if pieces <= _TRIED:
            return self._attempt(stretch, parallel, each, pieces)
        less, more = (self._attempt(stretch, parallel, each, tried) for tried in (_TRIED - 1, _TRIED))
        return _further(less, more, pieces)

    def _other(
        self, stretch: Stretch, parallel: Parallel, each: int, pieces: int, own: Found
    ) -> Mapping[str, float]:
        """Bytes of another way to spread: what more micro-batches add is the same in both."""
        tried = min(pieces, 2)
        found = self._attempt(stretch, parallel, each, tried).bytes
        if tried == pieces:
            return found
        before = self._attempt(stretch, self.run.spread.parallel, each, tried).bytes
        more = {cause: own.bytes.get(cause, 0) - before.get(cause, 0) for cause in (*own.bytes, *before)}
        return {cause: found.get(cause, 0) + more.get(cause, 0) for cause in dict.fromkeys((*found, *more))}

    def _refused(self, stretch: Stretch, parallel: Parallel) -> str:
        """Why a run cannot be spread like this; nothing where it can."""
        plain = replace(self.run.spread, parallel=parallel, shard="node", offload=False)
        try:
            plain.check({stretch.name: stretch.stage.optim.kind}, elastic=self.run.deterministic == "elastic")
        except UserError as error:
            return str(error)
        return ""

    def _largest(self, found: Found, each: int) -> int:
        """What fits: activations grow with the samples of a micro-batch, and all else stays."""
        activations = found.bytes.get("activations", 0)
        room = gpu_called(self.wanted.gpu).memory * ROOM - (found.peak - activations)
        return max(0, int(room / activations * each)) if activations else each

    def _attempt(self, stretch: Stretch, parallel: Parallel, each: int, pieces: int) -> Found:
        at = stretch.first, parallel, each, pieces
        if at not in self._known:
            self._known[at] = self._try(stretch, parallel, each, pieces)
        return self._known[at]

    def _try(self, stretch: Stretch, parallel: Parallel, each: int, pieces: int) -> Found:
        samples = _rounded(self._shares(stretch), each)
        at = stretch.name, parallel
        if at not in self._trials:
            self._trials[at] = self._trial(stretch.name, parallel)
        return self._trials[at].step(
            lambda paper: micro_batches(
                paper, self.inputs, samples, pieces=pieces, resolution=stretch.resolution
            ),
        )

    def _trial(self, stage: str, parallel: Parallel) -> Trial:
        wanted, run = self.wanted, self.run
        return Trial(
            Setting(
                run=run,
                stage=stage,
                tokenizer=self.tokenizer,
                feeds=feeding(run, stage),
                world=wanted.gpus,
                per_node=wanted.gpus_per_node,
                parallel=parallel,
                kind="cuda",
                bf16=run.precision.autocast != "off",
            )
        )

    def _shares(self, stretch: Stretch) -> dict[str, float]:
        """Of the sources that a stretch reads, the mean share of its batches."""
        own = {name: source.weight for name, source in self.run.sources.items()}
        weights = weights_in(stretch.stage.sources, own, begins=stretch.begins)
        steps = range(stretch.first, stretch.last, max(1, (stretch.last - stretch.first) // _LOOKED))
        shares = dict.fromkeys(weights, 0.0)
        for step in steps:
            now = {name: weight_at(weight, step) for name, weight in weights.items()}
            for name, weight in now.items():
                shares[name] += weight / sum(now.values()) / len(steps)
        return shares


def _rounded(shares: Mapping[str, float], each: int) -> dict[str, int]:
    """Samples of each source in a micro-batch: whole ones, never fewer than its share."""
    # What is only an error of adding up is no sample.
    return {name: ceil(round(each * share, 6)) for name, share in shares.items()}


def _further(less: Found, more: Found, pieces: int) -> Found:
    """A step of more micro-batches than were tried: two, and three.

    Towers run once for each, and what contrasts has as many pairs as the square of their number, so FLOPs
    have a term of each kind; all else is a straight line.
    """
    flops: dict[str, int] = {}
    for part in less.flops:
        two, three = less.flops[part], more.flops[part]
        square = three / 3 - two / 2
        flops[part] = round((two / 2 - 2 * square) * pieces + square * pieces**2)

    def line(at: Mapping, then: Mapping) -> dict:  # type: ignore[type-arg]
        keys = dict.fromkeys((*at, *then))
        return {k: round(at.get(k, 0) + (pieces - 2) * (then.get(k, 0) - at.get(k, 0))) for k in keys}

    return replace(less, flops=flops, bytes=line(less.bytes, more.bytes), sent=line(less.sent, more.sent))
