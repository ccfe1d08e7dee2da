"""What is judged or exported: the model of a run directory or of an export. Nothing there is changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from datasets.errors import UserError
from datasets.tokens import Tokenizer, TrainedBPE
from pretrain import checkpoint, runfile
from pretrain.build import build_pretrainer
from pretrain.config import Run
from pretrain.curriculum import Curriculum
from pretrain.distributed import Ranks
from pretrain.evaluate.judge import Matcher, compared_by, matcher_of
from pretrain.rundir import RunDir
from pretrain.zoo.dual import Dual
from pretrain.zoo.models import own_tokenizer

Weights = Literal["ema", "raw"]
"""Which weights of a checkpoint: their moving average, where it has one, or those that were trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model with what belongs to it."""

    name: str
    model: Dual
    tokenizer: Tokenizer
    compares: bool
    """Whether its embeddings of images and texts were trained to be compared."""
    matcher: Matcher | None
    """What says whether an image and a text match; None where the model was not trained to."""
    resolution: int
    """Side of the images in pixels that it was last trained with."""
    step: int
    """Optimizer steps done; 0 for an export, which does not say."""
    run: Run | None
    """How it was trained; None for an export."""
    averaged: bool = False
    """Whether its weights are the moving average of those that were trained."""


def load_subject(
    path: Path, *, step: int | None = None, weights: Weights = "ema", ranks: Ranks | None = None
) -> Subject:
    """Read the model of a run, from its newest checkpoint or that of a step, or of an export.

    Args:
        path: the run directory, or the export.
        step: of the checkpoint; by default the newest.
        weights: `ema` for their moving average where the checkpoint has one, `raw` for what was trained.
        ranks: whose device it is put on; by default on the CPU.

    Raises:
        UserError: it is neither, or there is no such checkpoint.
    """
    ranks = ranks or Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
    rundir = RunDir(path)
    if rundir.run_yaml.is_file():
        return _of_run(rundir, step, weights, ranks)
    if (path / "open_clip_config.json").is_file() or (path / "config.json").is_file():
        from pretrain.export.reading import load_export

        model, tokenizer, resolution = load_export(path)
        return Subject(
            name=str(path),
            model=model.to(ranks.device),
            tokenizer=tokenizer,
            compares=True,
            matcher=None,
            resolution=resolution,
            step=0,
            run=None,
        )
    raise UserError(f"{path} is neither a run directory (no run.yaml) nor an export (no config file)")


def _of_run(rundir: RunDir, step: int | None, weights: Weights, ranks: Ranks) -> Subject:
    run = runfile.load(rundir.run_yaml)
    found = checkpoint.chosen(rundir.checkpoints, step)
    tokenizer = own_tokenizer(run.model) or TrainedBPE.load(rundir.tokenizer)
    pretrainer = build_pretrainer(run, tokenizer, ranks, load=False)
    saved = found.tensors()
    pretrainer.load_state_dict(saved["model"].load())
    averages = saved["ema"].load() if weights == "ema" and "ema" in saved else {}
    with torch.no_grad():
        for name, average in averages.items():
            pretrainer.get_parameter(name).copy_(average)
    last = Curriculum(run.stages).stretch_of(max(0, found.step - 1))
    return Subject(
        name=str(rundir.root),
        model=pretrainer.eval().model,
        tokenizer=tokenizer,
        compares=compared_by(pretrainer.objectives),
        matcher=matcher_of(pretrainer.objectives),
        resolution=last.resolution,
        step=found.step,
        run=run,
        averaged=bool(averages),
    )
