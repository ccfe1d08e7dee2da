"""What happens when the last step is done: draw the curves, and write the page that shows all of it."""

from __future__ import annotations

from datasets.errors import UserError
from pretrain.cli import Command
from pretrain.curriculum import Curriculum
from pretrain.report.page import write_report
from pretrain.rundir import RunDir
from pretrain.sinks import plots
from pretrain.sinks.jsonl import read
from pretrain.training import Training


def unfinished(rundir: RunDir, curriculum: Curriculum, *, step: int | None, stage: str | None) -> list[str]:
    """The stages to train, in order: those that were not trained to their last step and judged.

    Args:
        rundir: of the run.
        curriculum: its stages.
        step: of the checkpoint to go on from: where the one at the end of a stage is damaged, its last steps
            are done again. None where no checkpoint is left.
        stage: the only one that is asked for; None for all.

    Raises:
        UserError: there is no such stage, or one before it is not finished.
    """
    records = read(rundir.metrics) if rundir.metrics.exists() else []
    judged = {record["step"] for record in records if "finished" in record}
    there = curriculum.steps if step is None else step
    left = [name for name, end in curriculum.ends().items() if end not in judged or end > there]
    if stage is None:
        return left
    curriculum.of_stage(stage)
    if stage in left and left[0] != stage:
        raise UserError(
            f"stage {stage!r} goes on from stage {left[0]!r}, which is not finished in {rundir.root}: train "
            f"that first, with --stage {left[0]}, or name its --out"
        )
    return [stage] if stage in left else []


def already(command: Command) -> str:
    """What to say where nothing is left to train."""
    names = list(command.run.stages)
    if command.stage is None or command.stage == names[-1]:
        return f"{command.out} is finished; a larger --stages.NAME.steps goes on with it"
    following = names[names.index(command.stage) + 1]
    return f"stage {command.stage} is finished in {command.out}; --stage {following} goes on with it"


def show(training: Training) -> None:
    """Draw the curves of the run so far and write its report, on rank zero."""
    if not training.ranks.zero:
        return
    rundir = training.rundir
    plots.draw(rundir.metrics, rundir.plots)
    try:
        report = write_report([rundir.root], rundir.report)
    except UserError as error:  # what was trained is safe, and the report can be written any time
        training.sink.note(f"warning: {error}")
    else:
        training.sink.note(f"curves, samples and settings: {report}")
