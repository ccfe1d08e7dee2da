"""The two programs and how each is told to do the same.

The same for both: the towers and their initial weights, the pairs, the batch, AdamW and its settings, warm-up
and cosine, clipping, the random crop, one intra-op thread, one reader. What remains is what the systems are:

* open_clip_train makes passes over pairs, Medley over images with a caption drawn for each; a step has the
  same number of pairs. open_clip_train saves only at the end of an epoch, so the stretch between two
  checkpoints is its epoch (`--train-num-samples`).
* open_clip_train runs every text at the context length, Medley at the length of the batch's longest.
* Each runs the towers in its faster precision; Medley's logits are float32 in any.
* An equal caption of another image is a negative for open_clip_train and none for Medley.
* open_clip_train decays position embeddings, Medley does not.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.learning.watch import Training
from pretrain.optim import Optim
from pretrain.zoo.models import OpenClipConfig, own_resolution

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}
PRECISIONS = ("fp32", "amp_bf16")
"""What open_clip_train has that runs on a CPU and keeps float32 weights."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both train by."""

    model: str
    """An open_clip model configuration, JSON."""
    batch: int
    lr: float
    crop: float
    """The least share of an image's area that a random crop keeps."""
    marks: int
    """Checkpoints of a run, evenly spread."""
    cpu_seconds: float
    """What a run of open_clip_train should take."""
    warmup: float = 0.1
    """Share of the steps."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    clip: float = 1.0

    @property
    def optim(self) -> Optim:
        """As Medley calls it."""
        return Optim(
            kind="adamw",
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run."""

    settings: Settings
    every: int
    """Steps between checkpoints."""
    marks: int
    """Checkpoints."""
    seed: int
    initial: Path
    """The weights that it starts from, safetensors."""
    folder: Path
    """Where it may write."""

    @property
    def steps(self) -> int:
        """All of them."""
        return self.every * self.marks

    @property
    def warmup(self) -> int:
        """Steps."""
        return max(1, round(self.settings.warmup * self.steps))

    @property
    def saved(self) -> range:
        """The steps that make a checkpoint."""
        return range(self.every, self.steps + 1, self.every)


def open_clip_train(job: Job, *, python: Path, pairs: str, precision: str) -> Training:
    """open_clip's training program on the pairs of a brace range."""
    settings, checkpoints = job.settings, job.folder / "run" / "checkpoints"
    flags = {
        "model": Path(settings.model).stem,
        "pretrained": job.initial,
        "dataset-type": "webdataset",
        "train-data": pairs,
        "train-num-samples": job.every * settings.batch,
        "epochs": job.marks,
        "batch-size": settings.batch,
        "lr": settings.lr,
        "beta1": settings.betas[0],
        "beta2": settings.betas[1],
        "eps": settings.eps,
        "wd": settings.weight_decay,
        "warmup": job.warmup,
        "grad-clip-norm": settings.clip,
        "aug-cfg": f"scale=({settings.crop},1.0)",
        "precision": precision,
        "workers": 1,
        "device": "cpu",
        "seed": job.seed,
        "logs": job.folder,
        "name": "run",
    }
    driver = Path(__file__).with_name("peer.py")
    return Training(
        command=[str(python), "-I", str(driver), settings.model, str(checkpoints), *_spelled(flags)],
        checkpoints=checkpoints,
        names={step: f"epoch_{epoch}.pt" for epoch, step in enumerate(job.saved, start=1)},
        weights={step: checkpoints / f"epoch_{epoch}.safetensors" for epoch, step in enumerate(job.saved, 1)},
    )


def medley(job: Job, *, data: str, optim: Optim) -> Training:
    """Medley's `itc` on the same tar shards, with `job.settings.optim` or another optimizer."""
    settings, checkpoints = job.settings, job.folder / "run" / "checkpoints"
    stage = "stages.one."
    flags = {
        "objectives": "itc",
        "model": f"open_clip:{settings.model}",
        "model.pretrained": job.initial,
        "data": data,
        f"{stage}batch": settings.batch,
        f"{stage}steps": job.steps,
        f"{stage}resolution": resolution(settings.model),
        f"{stage}optim.kind": optim.kind,
        f"{stage}optim.lr": optim.lr,
        f"{stage}optim.eps": optim.eps,
        f"{stage}optim.weight-decay": optim.weight_decay,
        f"{stage}optim.warmup": job.warmup,
        f"{stage}optim.clip": optim.clip,
        "stages.one.augment.crop": settings.crop,
        "precision.threads": 1,
        "loader-threads": 1,
        "cadence.checkpoint": job.every,
        "cadence.keep": job.marks,
        "cadence.report": job.every,
        "eval.every": 0,
        "seed": job.seed,
        "out": job.folder / "run",
    }
    betas = [f"--{stage}optim.betas", *map(str, optim.betas)]
    launch = [sys.executable, "-m", "pretrain.launch"]
    return Training(
        command=[*launch, *_spelled(flags), *betas, "--stages.one.augment.no-flip"],
        checkpoints=checkpoints,
        names={step: f"step-{step:08d}*" for step in job.saved},
        weights={step: checkpoints / f"step-{step:08d}" / "model.safetensors" for step in job.saved},
    )


def resolution(model: str) -> int:
    """Side in pixels of the images that a configuration is made for.

    Raises:
        UserError: there is no such configuration.
    """
    side = own_resolution(OpenClipConfig(name=model))
    assert side is not None
    return side


def _spelled(flags: dict[str, object]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]
