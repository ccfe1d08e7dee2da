"""What is written down of the steps that were done: the ledger, the metrics, the sentences."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from pretrain.clock import peak_memory
from pretrain.step import StepReport
from pretrain.training import Training


def report(training: Training) -> None:
    """Read the pending numbers from the device, write the ledger, and tell the sinks their mean."""
    pending, training.pending = training.pending, []
    for step, samples, done in pending:
        loss, norm = float(done.values["loss"]), float(done.norms.whole)
        if training.ledger is not None:
            alarm = training.ledger.record(step, [f"{i:x}" for i in samples.tolist()], loss=loss, norm=norm)
            if alarm is not None:
                training.sink.note(f"warning: {alarm}")
    if not pending:
        return
    step = pending[-1][0]
    standing, curriculum = training.standing, training.curriculum
    end = curriculum.ends()[training.stage] if training.alone else curriculum.steps
    left = curriculum.samples_at(end) - curriculum.samples_at(standing.step)
    reading = training.clock.read(remaining=left)
    data, warning = training.health.report(reading, standing.accounts, spent=training.stopwatch.take())
    if warning is not None:
        training.sink.note(warning)
    training.sink.step(
        step,
        {
            "samples": standing.samples,
            **_means([done for _, _, done in pending if done.fault is None]),
            "train/skipped": sum(standing.skipped.values()),
            **{f"train/skipped/{kind}": count for kind, count in standing.skipped.items()},
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


def _means(taken: Sequence[StepReport]) -> dict[str, float]:
    """Each value over the steps that have one: not every step of a mixture feeds an objective or a tower.

    A step that was skipped has none: one NaN would hide all others.
    """
    values: dict[str, list[float]] = {}
    for done in taken:
        losses = {f"train/{at}": value for at, value in done.values.items()}
        norms = {f"model/gradient_norm/{tower}": norm for tower, norm in done.norms.by_tower.items()}
        for at, value in {**losses, "model/gradient_norm": done.norms.whole, **norms}.items():
            values.setdefault(at, []).append(float(value))
    return {at: mean(each) for at, each in values.items()}
