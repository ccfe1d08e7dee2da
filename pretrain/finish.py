"""What happens when the last step is done: draw the curves, and write the page that shows all of it."""

from __future__ import annotations

from datasets.errors import UserError
from pretrain.curriculum import Curriculum
from pretrain.report.page import write_report
from pretrain.rundir import RunDir
from pretrain.sinks import plots
from pretrain.sinks.jsonl import read
from pretrain.training import Training


def is_finished(rundir: RunDir, curriculum: Curriculum) -> bool:
    """Whether this run was trained to its last step and judged."""
    if not rundir.metrics.exists():
        return False
    return any(record["step"] == curriculum.steps and "finished" in record for record in read(rundir.metrics))


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
