"""Evaluation while a model trains: when it is due, and what is written of it."""

from __future__ import annotations

from contextlib import nullcontext

from datasets.classes import load_classes
from datasets.errors import UserError
from datasets.scenes import Scenes
from datasets.source import Source
from pretrain.evaluate.examine import examine
from pretrain.evaluate.judge import Judge, compared_by, matcher_of
from pretrain.evaluate.observe import StoppedError
from pretrain.evaluate.possible import Examination, plan
from pretrain.evaluate.results import AVERAGED, Results, save, table
from pretrain.evaluate.scenes import examine_scenes
from pretrain.evaluate.sheet import make_sheet, save_sheet
from pretrain.sinks.jsonl import read
from pretrain.training import Training


def is_due(training: Training, step: int) -> bool:
    """Whether the model is judged after so many steps: every so often, and after the last of a stage."""
    every = training.run.eval.every
    return step in training.curriculum.ends().values() or (every > 0 and step > 0 and step % every == 0)


def is_pending(training: Training) -> bool:
    """Whether the run stands where an evaluation is due that was never made."""
    step, metrics = training.standing.step, training.rundir.metrics
    if not is_due(training, step):
        return False

    def made() -> bool:
        records = (record for record in read(metrics) if record["step"] == step)
        return any(name == "finished" or name.startswith("eval/") for each in records for name in each)

    return not training.ranks.on_zero(made)


def check(training: Training) -> None:
    """Refuse an evaluation that cannot be made, before hours of training lead up to it.

    Raises:
        UserError: a class file that is none or not of this data, or nothing that can be measured.
    """
    if training.val is not None:
        for sentence in plan(judge_of(training), _examination(training, training.val)).left_out:
            training.sink.note(sentence)


def evaluate(training: Training) -> bool:
    """Judge the model on all ranks together, tell the sinks, and write a sample sheet.

    It is the average of the weights that is judged, where there is one.

    Returns:
        False where a rank was asked to stop first: nothing is told, and the next start judges anew.
    """
    averaged = nullcontext() if training.ema is None else training.ema.swapped()
    with training.clock.pause(), averaged, training.setup.wrapped.whole():
        try:
            results = _examine(training)
        except StoppedError:
            return False
        except UserError as error:
            if _is_last(training):
                raise
            # Half-way, training matters more: another --val or --eval.classes is in time until the end.
            training.sink.note(f"warning: step {training.standing.step} is not judged: {error}")
            return True
        if training.ranks.zero:
            _tell(training, results)
            _show(training, results)
        training.ranks.wait()
    return True


def judge_of(training: Training) -> Judge:
    """The model as evaluation sees it."""

    def asked() -> bool:
        training.clock.move()
        return training.asked()

    return Judge(
        model=training.pretrainer.model,
        tokenizer=training.tokenizer,
        compute=training.setup.compute,
        batch=training.run.eval.batch,
        compares=compared_by(training.pretrainer.objectives),
        matcher=matcher_of(training.pretrainer.objectives),
        rerank=training.run.eval.rerank,
        asked=asked,
    )


def _examine(training: Training) -> Results:
    judge, ranks = judge_of(training), training.ranks
    if _on_scenes(training):
        return examine_scenes(judge, resolution=_resolution(training), ranks=ranks)
    if training.val is None:
        return {}
    examination = _examination(training, training.val)
    return examine(judge, examination, ranks=ranks, note=training.sink.note)


def _examination(training: Training, val: Source) -> Examination:
    settings = training.run.eval
    return Examination(
        source=val,
        resolution=_resolution(training),
        classes=load_classes(settings.classes) if settings.classes else None,
        limit=settings.limit or None,
    )


def _tell(training: Training, results: Results) -> None:
    """The numbers, to whoever follows the run."""
    step, samples, last = training.standing.step, training.standing.samples, _is_last(training)
    values = {f"eval/{name}": result.value for name, result in results.items()}
    training.sink.step(step, {"samples": samples, **values, **({"finished": 1.0} if last else {})})
    if not results:
        lines = ["nothing to evaluate on: name data by --val"]
    elif last:
        lines = ["", *table(results), *([] if training.ema is None else [AVERAGED]), ""]
    else:
        lines = [f"step {step}: " + "  ".join(f"{name} {each.value:.3f}" for name, each in results.items())]
    for line in lines:
        training.sink.note(line)


def _show(training: Training, results: Results) -> None:
    """The files beside the numbers; training goes on without them."""
    step, source = training.standing.step, Scenes(split="test") if _on_scenes(training) else training.val
    try:
        save(
            training.rundir.evaluations / "val.json",
            results,
            step=step,
            data=training.run.val or training.run.data,
            limit=0 if _on_scenes(training) else training.run.eval.limit,
            classes=training.run.eval.classes,
            resolution=_resolution(training),
            averaged=training.ema is not None,
        )
        if source is not None:
            sheet = make_sheet(judge_of(training), source, resolution=_resolution(training))
            save_sheet(sheet, training.rundir.samples, step=step, samples=training.standing.samples)
    except (OSError, UserError) as error:
        training.sink.note(f"warning: no sample sheet of step {step}: {error}")


def _is_last(training: Training) -> bool:
    return training.standing.step in training.curriculum.ends().values()


def _on_scenes(training: Training) -> bool:
    return (training.run.val or training.run.data) == "scenes"


def _resolution(training: Training) -> int:
    return training.curriculum.stretch_of(max(0, training.standing.step - 1)).resolution
