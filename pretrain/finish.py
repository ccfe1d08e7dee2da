"""What happens when the last step is done: judge the model, say what came of it, draw the curves."""

from __future__ import annotations

from pretrain.curriculum import Curriculum
from pretrain.evaluate.final import Results, judge_pairs, judge_scenes, table
from pretrain.evaluate.judge import Judge
from pretrain.loop import Training
from pretrain.rundir import RunDir
from pretrain.sinks import plots
from pretrain.sinks.jsonl import read


def is_finished(rundir: RunDir, curriculum: Curriculum) -> bool:
    """Whether this run was trained to its last step and judged."""
    if not rundir.metrics.exists():
        return False
    return any(record["step"] == curriculum.steps and "finished" in record for record in read(rundir.metrics))


def finish(training: Training) -> None:
    """Judge the trained model on rank zero and write what was found."""
    if training.ranks.zero:
        draw(training)
        results = judge(training)
        values = {f"eval/{name}": result.value for name, result in results.items()}
        samples = training.standing.position
        training.sink.step(training.standing.step, {"samples": samples, "finished": 1.0, **values})
        nothing = "nothing to judge: retrieval needs --val, and an objective that reads the text tower"
        for line in ["", *table(results), ""] if results else [nothing]:
            training.sink.note(line)
    training.ranks.wait()


def draw(training: Training) -> None:
    """Draw the curves of the run so far."""
    pictures = plots.draw(training.rundir.metrics, training.rundir.plots)
    if pictures:
        training.sink.note(f"curves: {', '.join(map(str, pictures))}")


def judge(training: Training) -> Results:
    """Everything that can be measured with the data at hand."""
    run, judge = (
        training.run,
        Judge(model=training.pretrainer.model, tokenizer=training.tokenizer, compute=training.compute),
    )
    resolution = training.curriculum.stretches[-1].stage.resolution
    results: Results = {}
    if (run.val or run.data) == "scenes":
        results |= judge_scenes(judge, resolution=resolution)
    elif training.val is not None and judge.model.text is not None:
        results |= judge_pairs(judge, training.val, resolution=resolution)
    return results
