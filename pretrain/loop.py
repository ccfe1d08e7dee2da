"""The training loop."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from datasets.batch import Batch
from datasets.errors import UserError
from datasets.loader import Loader, Masked, Portion
from datasets.mixture import Account
from datasets.weights import weight_at, weights_in
from objectives.gather import count_rows
from pretrain.build import feeds_in
from pretrain.curriculum import Stretch
from pretrain.distributed import Ranks
from pretrain.evaluate import during
from pretrain.faults import Fault, is_fit
from pretrain.optim import set_rate
from pretrain.preempt import Preemption
from pretrain.reports import report
from pretrain.saving import save
from pretrain.skipping import answer, check_sound
from pretrain.step import Agreed, agree, backward, train_step
from pretrain.training import Training


def train(training: Training, preemption: Preemption) -> Literal["finished", "interrupted"]:
    """Train from where the run stands to the end of its stage, or to the step boundary after a signal."""
    # The process ended before it had.
    if during.is_pending(training) and not during.evaluate(training):
        return "interrupted"
    for stretch in training.curriculum.of_stage(training.stage):
        first = max(stretch.first, training.standing.step)
        loader = _loader(training, stretch)
        portions = loader.steps(first, stretch.last, accounts=_accounts(training, stretch))
        with closing(portions):
            for step in range(first, stretch.last):
                with training.clock.waiting(cold=step == first):
                    portion = next(portions)
                batches = [batch.to(training.ranks.device) for batch in portion.batches]
                asking = {
                    "stop": float(preemption.requested is not None),
                    "masked": len(portion.masked),
                    "unfit": sum(not is_fit(batch) for batch in portion.batches),
                    **training.saver.asks(),
                }
                agreed = agree(training.setup, batches, asking=asking)
                with training.clock.pause():
                    training.saver.settle(agreed.sums)
                if agreed.sums["stop"]:
                    check_sound(training, stretch)
                    save(training, last=True)
                    return "interrupted"
                faults = _set_aside(training, portion.masked, agreed, stretch)
                fault = _one_step(training, stretch, portion, batches, agreed)
                _advance(training, stretch, portion, faults, fault)
                if fault is not None:
                    with training.clock.pause():
                        answer(training, stretch, batches, fault)

                # Once in a while.
                done = step + 1
                judged = during.is_due(training, done)
                if judged or done % training.run.cadence.report == 0 or done == stretch.last:
                    report(training)
                # In a streak of skipped steps the checkpoint before it stays the newest.
                due = done % training.run.cadence.checkpoint == 0 and not training.standing.streak
                if judged or due:
                    check_sound(training, stretch)
                    save(training, last=done == stretch.ends)
                if judged:
                    with training.clock.pause():
                        training.saver.finish()
                    if not during.evaluate(training):
                        return "interrupted"  # with this step saved
    return "finished"


def check(training: Training) -> None:
    """Refuse stretches whose batches these sources and ranks cannot share, before any is trained.

    Raises:
        UserError: names the sizes.
    """

    def every_stage() -> None:
        for stretch in training.curriculum.stretches:
            _loader(training, stretch)

    training.ranks.on_zero(every_stage)


def rehearsal(training: Training) -> Callable[[], None]:
    """A forward and backward of the stage's first batch that changes nothing, for measuring."""
    stretch = training.curriculum.of_stage(training.stage)[0]

    @cache
    def first_batches() -> list[Batch]:
        (portion,) = _loader(training, stretch).steps(stretch.first, stretch.first + 1)
        return [batch.to(training.ranks.device) for batch in portion.batches]

    def step() -> None:
        batches = first_batches()
        counts = agree(training.setup, batches).counts
        factors = {name: 1.0 / count.clamp(min=1) for name, count in counts.items()}
        backward(training.setup, batches, factors, key=(training.run.seed, 0))
        training.optimizer.zero_grad(set_to_none=True)

    return step


def _loader(training: Training, stretch: Stretch) -> Loader:
    run, ranks = training.run, training.ranks
    return Loader(
        feeds_in(stretch, training.feeds),
        training.tokenizer,
        seed=run.seed,
        batch=stretch.batch,
        rank=ranks.rank,
        ranks=ranks.world,
        micro_batches=training.setup.wrapped.micro_batches or stretch.micro_batches,
        resolution=stretch.resolution,
        augment=stretch.stage.augment,
        threads=run.loader_threads,
        shuffle=run.shuffle,
        meter=training.health.meter,
        late=lambda seconds: _tell(training, training.health.late(seconds)),
    )


def _accounts(training: Training, stretch: Stretch) -> Mapping[str, Account]:
    """Where the sources stand; a new stage owes none of them what the one before did."""
    accounts, begins = training.standing.accounts, training.standing.step == stretch.begins
    return {name: Account(account.position) for name, account in accounts.items()} if begins else accounts


def _one_step(
    training: Training, stretch: Stretch, portion: Portion, batches: Sequence[Batch], agreed: Agreed
) -> Fault | None:
    """Take it; why it was skipped instead, if it was."""
    run, stage, ranks, step = training.run, stretch.stage, training.ranks, portion.step
    set_rate(training.optimizer, stage.optim, step=step - stretch.begins, steps=stage.steps)
    own = {name: config.weight for name, config in run.objectives.items()}
    weights = weights_in(stage.objectives, own, begins=stretch.begins)
    with training.stopwatch.step(portion.batches):
        done = train_step(
            training.setup,
            batches,
            training.optimizer,
            counts=agreed.counts,
            weights={name: weight_at(weights.get(name, 0.0), step) for name in own},
            largest_norm=stage.optim.clip,
            key=(run.seed, step),
            unfit=agreed.sums["unfit"] > 0,
            ema=training.ema,
        )
    training.pending.append((step + 1, _sample_ids(batches, ranks), done))
    return done.fault


def _advance(
    training: Training, stretch: Stretch, portion: Portion, faults: Counter[str], fault: Fault | None
) -> None:
    """The step is done: what it used is used, also where it was skipped."""
    standing = training.standing
    training.standing = replace(
        standing,
        step=portion.step + 1,
        samples=standing.samples + stretch.batch,
        accounts={**standing.accounts, **portion.accounts},
        masked=dict(Counter(standing.masked) + faults),
        behind=training.curriculum.finished_at(portion.step),
        skipped=dict(Counter(standing.skipped) + Counter([fault.kind] if fault else [])),
        streak=standing.streak + 1 if fault else 0,
    )
    training.clock.step(stretch.batch)


def _tell(training: Training, sentence: str) -> None:
    """Say it where it is heard, at a time of this rank's own."""
    if training.ranks.zero:
        training.sink.note(sentence)
    else:
        sys.stderr.write(f"rank {training.ranks.rank}: {sentence}\n")


def _set_aside(
    training: Training, masked: Sequence[Masked], agreed: Agreed, stretch: Stretch
) -> Counter[str]:
    """Record the samples of a step that cannot be read; how many there are of each kind.

    Raises:
        UserError: there are more than the budgets allow, or not one of the step can be read. What was
            trained is saved.
    """
    if agreed.sums["masked"] == 0:
        return Counter()
    all_masked = [one for each in training.ranks.gather_objects(masked) for one in each]
    verdict = training.ranks.on_zero(lambda: _verdict(training, all_masked, stretch.batch))
    if agreed.sums["masked"] == stretch.batch:
        one = all_masked[0]
        verdict = f"not one sample of a whole batch can be read ({one.key}: {one.fault}): check --data"
    if verdict is not None:
        check_sound(training, stretch)
        save(training, last=True)
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
        ids = torch.cat([batch.sample_id for batch in batches if batch.source == source])
        parts.append(count_rows(len(ids), ranks.group, ranks.device).gather(ids))
    return torch.cat(parts)
