"""What a step of some of a run's objectives costs, measured on a few samples of its first batch.

S samples, B images, N texts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from datasets.batch import Batch
from pretrain.coupled import Pool
from pretrain.distributed import Ranks
from pretrain.flops import AGAIN, Counter, counting
from pretrain.memory import Alive
from pretrain.parallel import Wrapped, wrap
from pretrain.precision import Compute
from pretrain.pretrainer import Pretrainer
from pretrain.step import Part, Setup, agree, backward

TOWERS = ("image", "text", "captioner", "fusion")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one step of this rank."""

    flops: float
    """Of a sample, forward and backward."""
    again: float
    """Of a sample, beside these: what is run a second time to save memory."""
    held: tuple[float, float]
    """Bytes that the forward of a micro-batch keeps for its backward: in any case (parameters in the type of
    autocast), and for each sample."""
    runs: Mapping[str, int]
    """How often each tower is run forward, over all micro-batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What every measurement works with."""

    pretrainer: Pretrainer
    """With all objectives of the run, not wrapped."""
    feeds: Mapping[str, Sequence[str]]
    """Of each source, the objectives that see it."""
    batches: Sequence[Batch]
    """Micro-batches of a step."""
    ranks: Ranks
    compute: Compute
    pool: Pool
    lanes: int | None
    """Of an elastic run."""
    seed: int

    def measure(self, names: Sequence[str]) -> Cost:
        """The cost of a step in which these are all objectives there are."""
        fed = [batch for batch in self.batches if {*names} & {*self.feeds[batch.source]}]
        if not fed:  # the first step has nothing of the sources that feed them
            return Cost(flops=0.0, again=0.0, held=(0.0, 0.0), runs={})
        whole = self.pretrainer
        part = Pretrainer(
            whole.model,
            {name: whole.objectives[name] for name in names},
            self.ranks.group,
            feeds={source: [each for each in fed if each in names] for source, fed in self.feeds.items()},
        )
        less = self._run(part, [few(batch, len(batch.keys) // 2) for batch in self.batches])
        more = self._run(part, self.batches)
        samples = sum(len(batch.keys) for batch in self.batches)
        slope = (more.held - less.held) / (more.largest - less.largest)
        return Cost(
            flops=(more.counter.counts["forward"] + more.counter.counts["backward"]) / samples,
            again=more.counter.counts[AGAIN] / samples,
            held=(max(more.held - slope * more.largest, 0.0), slope),
            runs=dict(more.runs),
        )

    def _run(self, part: Pretrainer, batches: Sequence[Batch]) -> _Meter:
        """Forward and backward, of which nothing stays."""
        batches = [batch for batch in batches if part.fed_by(batch.source)]
        meter, ranks = _Meter(part, max(len(batch.keys) for batch in batches)), self.ranks
        # Nothing is trained, so gradients need not meet; contrast meets through the group.
        wrapped = wrap(part, ranks, lanes=self.lanes) if self.lanes else Wrapped(part, ranks)
        setup = Setup(wrapped=wrapped, compute=self.compute, pool=self.pool, watch=meter.watch)
        counts = agree(setup, batches).counts
        factors = {name: 1.0 / count.clamp(min=1) for name, count in counts.items()}
        with meter.watching():
            backward(setup, batches, factors, key=(self.seed, 0))
        part.zero_grad(set_to_none=True)
        return meter


class _Meter:
    """Operations, bytes and runs of towers of one step."""

    def __init__(self, pretrainer: Pretrainer, largest: int) -> None:
        self.largest = largest
        """Samples of the largest micro-batch."""
        self.counter, self.alive = Counter(), Alive()
        self.runs: defaultdict[str, int] = defaultdict(int)
        self.held = 0
        self._pretrainer = pretrainer
        self.counter.watch_again(pretrainer)

    @contextmanager
    def watch(self, part: Part) -> Generator[None]:
        """Count a part; after a forward, what is alive beside gradients that are there already."""
        with counting(self.counter, part):
            yield
        if part == "forward":
            gradients = sum(
                each.grad.untyped_storage().nbytes()
                for each in self._pretrainer.parameters()
                if each.grad is not None
            )
            self.held = max(self.held, self.alive.bytes - gradients)

    @contextmanager
    def watching(self) -> Generator[None]:
        """Follow memory and towers inside."""
        hooks = []
        for name in TOWERS:
            tower = getattr(self._pretrainer.model, name)
            if tower is not None:
                hooks.append(tower.register_forward_pre_hook(lambda *_, name=name: self._run(name)))
        try:
            with self.alive:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _run(self, tower: str) -> None:
        self.runs[tower] += 1


def few(batch: Batch, samples: int) -> Batch:
    """The first samples of a micro-batch, at the length of text that the whole has."""
    device = batch.tokens.device
    some = torch.arange(len(batch.images), device=device) < samples
    # A text without an image is kept where its place is among the first.
    order = torch.arange(len(batch.tokens), device=device)
    place = torch.where(batch.image_index >= 0, batch.image_index, order)
    texts = place < samples
    return replace(
        batch,
        images=batch.images[some],
        image_valid=batch.image_valid[some],
        **{
            name: getattr(batch, name)[texts]
            for name in (
                "tokens", "text_length", "image_index", "text_valid", "text_id", "boxes", "box_valid",
            )
        },
        keys=batch.keys[:samples],
        sample_id=batch.sample_id[:samples],
    )  # fmt: skip
