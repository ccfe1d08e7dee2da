"""What utilisation reproduces the GPU-hours that open_clip published for LAION-400M.

    python -m benchmarks.plan [ViT-B-32 ViT-B-16 ViT-L-14]

Steps are run on paper as `--plan` does: 77 tokens a caption, as open_clip pads them, and for ViT-L/14 with
each block computed twice, which is no work of the model's: the share of the peak that the GPUs reached with
it stands in a column of its own. Published (open_clip, docs/PRETRAINED.md): A100s with 40 GB, their number,
the batch, and the hours for 12.8 billion samples, 32 epochs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pretrain.curriculum import Curriculum
from pretrain.plan.gpus import GB, gpu_called
from pretrain.plan.inputs import without_data
from pretrain.plan.leg import Paperwork
from pretrain.plan.paper import pretended
from pretrain.plan.wanted import Wanted, stand_in
from pretrain.recipes import clip
from pretrain.tables import table
from pretrain.zoo.models import OpenClipConfig, own_tokenizer

SAMPLES = 12.8e9
GPU = "a100-40"


@dataclass(frozen=True, slots=True)
class Published:
    """A run of LAION-400M."""

    gpus: int
    batch: int
    hours: float
    twice: bool = False
    """Whether activations were computed again in the backward."""


PUBLISHED = {
    "ViT-B-32": Published(128, 32_768, 36),
    "ViT-B-16": Published(176, 33_792, 61),
    "ViT-L-14": Published(400, 38_400, 127, twice=True),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What of the peak a run reached."""

    gigaflops: float
    """Of a sample."""
    memory: float
    """GB on a GPU at the fullest moment."""
    model: float
    """Share of the peak, of the model's own FLOPs."""
    hardware: float
    """The same with what is computed twice."""


def compare(name: str) -> Outcome:
    """Plan one of the published runs."""
    there, published = PUBLISHED[name], clip.recipe()
    stage = replace(published.stages["one"], batch=there.batch, steps=round(SAMPLES / there.batch))
    spread = replace(published.spread, activation_checkpointing=there.twice)
    run = replace(published, model=OpenClipConfig(name=name), stages={"one": stage}, spread=spread)
    tokenizer = own_tokenizer(run.model)
    assert tokenizer is not None
    inputs = without_data(run, pairs=SAMPLES, length=tokenizer.context_length, told="as open_clip pads them")
    work = Paperwork(
        run=stand_in(run), wanted=Wanted(gpus=there.gpus, gpu=GPU), tokenizer=tokenizer, inputs=inputs
    )
    with pretended(there.gpus):
        found = work.step(Curriculum(run.stages).stretches[0])
    own, again = found.flops["forward"] + found.flops["backward"], found.flops.get("again", 0)
    peak = gpu_called(GPU).flops * there.hours * 3600 / stage.steps
    return Outcome(own * there.gpus / there.batch / 1e9, found.peak / GB, own / peak, (own + again) / peak)


def main(arguments: Sequence[str]) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(PUBLISHED)}; all by default")
    models = parser.parse_args(arguments).models or list(PUBLISHED)
    if unknown := [name for name in models if name not in PUBLISHED]:
        parser.error(f"there is nothing published of {unknown[0]}; known: {', '.join(PUBLISHED)}")
    rows: list[list[str]] = []
    for name in models:
        there, got = PUBLISHED[name], compare(name)
        rows.append([
            name,
            f"{there.gpus}",
            f"{there.batch:,}",
            f"{there.gpus * there.hours:,.0f}",
            f"{got.gigaflops:,.4g}",
            f"{got.memory:,.3g}",
            f"{got.model:.1%}",
            f"{got.hardware:.1%}",
        ])  # fmt: skip
    heads = (
        *("model", "A100-40", "batch", "GPU-hours", "GFLOP a sample", "GB a GPU"),
        *("utilisation", "with what is computed twice"),
    )
    sys.stdout.writelines(f"{line}\n" for line in table(heads, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
