"""What is judged or exported: the model of a run directory or of an export. Nothing there is changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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


def load_subject(path: Path, *, step: int | None = None, ranks: Ranks | None = None) -> Subject:
    """Read the model of a run, from its newest checkpoint or that of a step, or of an export.

    Raises:
        UserError: it is neither, or there is no such checkpoint.
    """
    ranks = ranks or Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
    rundir = RunDir(path)
    if rundir.run_yaml.is_file():
        return _of_run(rundir, step, ranks)
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


def _of_run(rundir: RunDir, step: int | None, ranks: Ranks) -> Subject:
    run = runfile.load(rundir.run_yaml)
    found = checkpoint.chosen(rundir.checkpoints, step)
    tokenizer = own_tokenizer(run.model) or TrainedBPE.load(rundir.tokenizer)
    pretrainer = build_pretrainer(run, tokenizer, ranks, load=False)
    pretrainer.load_state_dict(found.tensors()["model"].load())
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
    )
