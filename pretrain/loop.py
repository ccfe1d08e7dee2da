"""The training loop."""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from statistics import mean
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from datasets.batch import Batch
from datasets.errors import UserError
from datasets.loader import Loader, Masked, Portion
from datasets.weights import weight_at
from objectives.gather import count_rows
from pretrain import checkpoint
from pretrain.clock import peak_memory
from pretrain.curriculum import Stretch
from pretrain.distributed import Ranks
from pretrain.evaluate import during
from pretrain.optim import set_rate
from pretrain.preempt import Preemption
from pretrain.state import capture
from pretrain.step import Agreed, StepReport, agree, backward, train_step
from pretrain.training import Training


def train(training: Training, preemption: Preemption) -> Literal["finished", "interrupted"]:
    """Train from where the run stands to its end, or to the step boundary after a signal."""
    if during.is_pending(training):
        during.evaluate(training)  # the process ended before it had
    for stretch, first in training.curriculum.from_step(training.standing.step):
        loader = _loader(training, stretch)
        portions = loader.steps(first, stretch.last, accounts=training.standing.accounts)
        with closing(portions):
            for step in range(first, stretch.last):
                with training.clock.waiting(cold=step == first):
                    portion = next(portions)
                batches = [batch.to(training.ranks.device) for batch in portion.batches]
                stop, masked = preemption.requested is not None, len(portion.masked)
                agreed = agree(training.wrapped, batches, training.ranks, stop=stop, masked=masked)
                if agreed.stop:
                    save(training)
                    return "interrupted"
                faults = _set_aside(training, portion.masked, agreed, stretch)
                _one_step(training, stretch, portion, batches, agreed)
                _advance(training, stretch, portion, faults)

                # Once in a while.
                done = step + 1
                judged = during.is_due(training, done)
                if judged or done % training.run.cadence.report == 0 or done == stretch.last:
                    report(training, stretch)
                if judged or done % training.run.cadence.checkpoint == 0:
                    save(training)
                if judged:
                    during.evaluate(training)
    return "finished"


def check(training: Training) -> None:
    """Refuse stages whose batches these sources and ranks cannot share, before any is trained.

    Raises:
        UserError: names the sizes.
    """

    def every_stage() -> None:
        for stretch in training.curriculum.stretches:
            _loader(training, stretch)

    training.ranks.on_zero(every_stage)


def rehearsal(training: Training) -> Callable[[], None]:
    """A forward and backward of the first stage's first batch that changes nothing, for measuring."""
    stretch = training.curriculum.stretches[0]

    @cache
    def first_batches() -> list[Batch]:
        (portion,) = _loader(training, stretch).steps(0, 1)
        return [batch.to(training.ranks.device) for batch in portion.batches]

    def step() -> None:
        batches = first_batches()
        counts = agree(training.wrapped, batches, training.ranks, stop=False, masked=0).counts
        factors = {name: 1.0 / count.clamp(min=1) for name, count in counts.items()}
        run = training.run
        backward(
            training.wrapped, batches, factors, compute=training.compute, seed=(run.seed,), pool=run.pool
        )
        training.optimizer.zero_grad(set_to_none=True)

    return step


def _loader(training: Training, stretch: Stretch) -> Loader:
    run, ranks = training.run, training.ranks
    return Loader(
        training.feeds,
        training.tokenizer,
        seed=run.seed,
        batch=stretch.stage.batch,
        rank=ranks.rank,
        ranks=ranks.world,
        micro_batches=stretch.stage.micro_batches,
        resolution=stretch.stage.resolution,
        train=True,
        threads=run.loader_threads,
        shuffle=run.shuffle,
        meter=training.health.meter,
        late=lambda seconds: _tell(training, training.health.late(seconds)),
    )


def _one_step(
    training: Training, stretch: Stretch, portion: Portion, batches: Sequence[Batch], agreed: Agreed
) -> None:
    run, stage, ranks, step = training.run, stretch.stage, training.ranks, portion.step
    set_rate(training.optimizer, stage.optim, step=step - stretch.first, steps=stage.steps)
    done = train_step(
        training.wrapped,
        batches,
        training.optimizer,
        counts=agreed.counts,
        weights={name: weight_at(config.weight, step) for name, config in run.objectives.items()},
        clip=stage.optim.clip,
        compute=training.compute,
        ranks=ranks,
        seed=run.seed,
        step=step,
        pool=run.pool,
    )
    training.pending.append((step + 1, _sample_ids(batches, ranks), done))


def _advance(training: Training, stretch: Stretch, portion: Portion, faults: Counter[str]) -> None:
    """The step is done: what it used is used."""
    standing = training.standing
    training.standing = replace(
        standing,
        step=portion.step + 1,
        samples=standing.samples + stretch.stage.batch,
        accounts=dict(portion.accounts),
        masked=dict(Counter(standing.masked) + faults),
    )
    training.clock.step(stretch.stage.batch)


def report(training: Training, stretch: Stretch) -> None:
    """Read the pending numbers from the device, write the ledger, and tell the sinks their mean.

    Raises:
        UserError: a loss or gradient norm is not finite; nothing of it was saved.
    """
    pending, training.pending = training.pending, []
    for step, samples, done in pending:
        loss, norm = float(done.values["loss"]), float(done.norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"step {step}: the loss is {loss} and the gradient norm {norm}; the run stops before a "
                f"checkpoint of it is written: try a lower --stages.{stretch.name}.optim.lr and another --out"
            )
        if training.ledger is not None:
            alarm = training.ledger.record(step, [f"{i:x}" for i in samples.tolist()], loss=loss, norm=norm)
            if alarm is not None:
                training.sink.note(f"warning: {alarm}")
    if not pending:
        return
    step = pending[-1][0]
    standing = training.standing
    left = training.curriculum.samples - training.curriculum.samples_at(standing.step)
    reading = training.clock.read(remaining=left)
    data, warning = training.health.report(reading, standing.accounts)
    if warning is not None:
        training.sink.note(warning)
    training.sink.step(
        step,
        {
            "samples": standing.samples,
            **_means(pending),
            "train/lr": training.optimizer.param_groups[0]["lr"],
            "model/logit_scale": float(training.pretrainer.model.logit_scale.detach().exp()),
            "perf/samples_per_second": reading.samples_per_second,
            "perf/seconds_left": reading.seconds_left,
            "perf/step_seconds_p50": reading.step_seconds_p50,
            "perf/step_seconds_p99": reading.step_seconds_p99,
            "perf/memory_gib": peak_memory(training.ranks.device),
            "perf/restarts": training.starts.restarts,
            "perf/lost_steps": training.starts.lost_steps,
            **data,
            "data/masked": sum(standing.masked.values()),
            **{f"data/masked/{kind}": count for kind, count in standing.masked.items()},
        },
    )


def _tell(training: Training, sentence: str) -> None:
    """Say it where it is heard, at a time of this rank's own."""
    if training.ranks.zero:
        training.sink.note(sentence)
    else:
        sys.stderr.write(f"rank {training.ranks.rank}: {sentence}\n")


def _means(pending: Sequence[tuple[int, Tensor, StepReport]]) -> dict[str, float]:
    """Each value over the steps that have one: not every step of a mixture feeds an objective or a tower."""
    values: dict[str, list[float]] = {}
    for _, _, done in pending:
        losses = {f"train/{at}": value for at, value in done.values.items()}
        norms = {f"model/gradient_norm/{tower}": norm for tower, norm in done.norms.items()}
        for at, value in {**losses, "model/gradient_norm": done.norm, **norms}.items():
            values.setdefault(at, []).append(float(value))
    return {at: mean(each) for at, each in values.items()}


def save(training: Training) -> None:
    """Bring everything that is known to the disk: ledger first, then the checkpoint it belongs to."""
    report(training, training.curriculum.stretch_of(max(0, training.standing.step - 1)))
    if training.ranks.zero:
        with training.clock.pause():
            for file in (training.ledger, training.quarantine):
                if file is not None:
                    file.flush()
            folder, step = training.rundir.checkpoints, training.standing.step
            tensors = capture(training.pretrainer, training.optimizer)
            checkpoint.save(folder, step, tensors, training.standing.plain())
            checkpoint.prune(folder, keep=training.run.cadence.keep)
    training.ranks.wait()


def _set_aside(
    training: Training, masked: Sequence[Masked], agreed: Agreed, stretch: Stretch
) -> Counter[str]:
    """Record the samples of a step that cannot be read; how many there are of each kind.

    Raises:
        UserError: there are more than the budgets allow, or not one of the step can be read. What was
            trained is saved.
    """
    if agreed.masked == 0:
        return Counter()
    everyone: list[Sequence[Masked]] = [masked]
    if training.ranks.group is not None:
        everyone = [[] for _ in range(training.ranks.world)]
        dist.all_gather_object(everyone, masked, group=training.ranks.group)
    all_masked = [one for each in everyone for one in each]
    verdict = training.ranks.on_zero(lambda: _verdict(training, all_masked, stretch.stage.batch))
    if agreed.masked == stretch.stage.batch:
        one = all_masked[0]
        verdict = f"not one sample of a whole batch can be read ({one.key}: {one.fault}): check --data"
    if verdict is not None:
        save(training)
        training.ranks.on_zero(lambda: _stop(verdict))
    return Counter(one.fault.kind for one in all_masked)


def _verdict(training: Training, masked: Sequence[Masked], batch: int) -> str | None:
    """Put a step's samples on the list and say so; the reason to stop, if there are too many with them."""
    assert training.quarantine is not None
    for sentence in training.quarantine.add(masked, step=training.standing.step):
        training.sink.note(sentence)
    standing = training.standing
    return training.quarantine.verdict(
        samples=standing.samples + batch - standing.samples_before,
        masked=sum(standing.masked.values()) + len(masked) - standing.masked_before,
    )


def _stop(reason: str) -> None:
    raise UserError(reason)


def _sample_ids(batches: Sequence[Batch], ranks: Ranks) -> Tensor:
    """(G,) int64 hashes of sources and keys of the global batch, in order: source by source."""
    parts: list[Tensor] = []
    for source in dict.fromkeys(batch.source for batch in batches):
        # Shards of two sources may have the same names, and so their samples.
        names = [f"{source}\0{key}" for batch in batches if batch.source == source for key in batch.keys]
        hashes = [
            int.from_bytes(hashlib.blake2b(n.encode(), digest_size=8).digest(), "little") >> 1 for n in names
        ]
        ids = torch.tensor(hashes, dtype=torch.int64, device=ranks.device)
        parts.append(count_rows(len(ids), ranks.group, ranks.device).gather(ids))
    return torch.cat(parts)
