"""The contrastive losses beside open_clip's: loss and gradients of a batch of pairs, on one process.

    python -m benchmarks.contrast [--batch 16384] [--loss itc|siglip] [--rounds 3] [--only medley]

All get the same embeddings, and the same kernels for float32 products, those that a run of Medley chooses.
Peak memory is over the embeddings and their `.grad`, which exists before. `open_clip` is its ClipLoss, or
its SigLipLoss; `open_clip chunked` is the latter as its development version, which is in no release, has it:
1,024 images at a time. Error is that of the gradient against float64 at scale 100: of pairs that are
strangers, of pairs that are alike, and of strangers under bfloat16 autocast. `bf16 wire` rounds embeddings
and gradients to bfloat16, as the setting of that name does on their way between ranks.
Exit code 1 where the bars against open_clip are missed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.beside import growth, in_own_process, in_turns, ratio
from datasets.batch import Batch
from objectives.base import IMAGE, TEXT, Pass
from objectives.contrast import block
from objectives.itc import info_nce
from objectives.siglip import sigmoid_loss
from pretrain.precision import Precision, compute_for

WIDTH, CHUNK, JUDGED = 512, 1024, 2048
SCALE, BIAS = 14.3, -10.0
BARS = {"itc": ("open_clip", 0.50, 1 / 20), "siglip": ("open_clip chunked", 1.0, 1 / 5)}
"""Beside whom, and the shares of its time and its memory."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""() mean over pairs of (B, D) images, (B, D) texts at a scale."""


class Given:
    """Encodings that are simply there."""

    group = None

    def __init__(self, image: Tensor, text: Tensor) -> None:
        self._given = {IMAGE: image, TEXT: text}

    def __getitem__(self, wanted: Pass) -> Tensor:
        return self._given[wanted]


def pairs(count: int, device: torch.device) -> Batch:
    """So many images with a caption each."""
    here = torch.arange(count, device=device)
    valid = torch.ones(count, dtype=torch.bool, device=device)
    return Batch(
        images=torch.zeros(count, 3, 0, 0, dtype=torch.uint8, device=device),
        image_valid=valid,
        tokens=torch.zeros(count, 0, dtype=torch.int64, device=device),
        text_length=torch.zeros_like(here),
        image_index=here,
        text_valid=valid,
        text_id=here,
        boxes=torch.zeros(count, 4, device=device),
        box_valid=~valid,
        keys=(),
        sample_id=here,
    )


def implementations(kind: str) -> dict[str, Loss]:
    """What is compared, by name, Medley first."""
    from open_clip.loss import ClipLoss, SigLipLoss

    def medley(image: Tensor, text: Tensor, scale: Tensor, *, rounded: bool = False) -> Tensor:
        encodings: Any = Given(image, text)
        here = block(encodings, pairs(len(image), image.device), "exact")
        if rounded:
            here = replace(here, texts=_rounded(here.texts), images=_rounded(here.images))
        if kind == "itc":
            return info_nce(image, text, scale, here)[0] / len(image)
        return sigmoid_loss(image, text, scale, torch.full_like(scale, BIAS), here)[0] / len(image)

    def on_the_wire(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        for side in (image, text):
            side.register_hook(_rounded)
        return medley(image, text, scale, rounded=True)

    def whole(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        if kind == "itc":
            return ClipLoss()(image, text, scale)
        return SigLipLoss()(image, text, scale, torch.full_like(scale, BIAS))

    def chunked(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        total = torch.zeros_like(scale)
        for first in range(0, len(image), CHUNK):
            logits = scale * image[first : first + CHUNK] @ text.T + BIAS
            logits.diagonal(first).neg_()
            total = total + F.softplus(logits).sum()  # keeps one matrix for the backward, as theirs does
        return total / len(image)

    both: dict[str, Loss] = {"medley": medley, "open_clip": whole}
    return {**both, "bf16 wire": on_the_wire} if kind == "itc" else {
        **both, "open_clip chunked": chunked, "bf16 wire": on_the_wire
    }  # fmt: skip


def _rounded(values: Tensor) -> Tensor:
    return values.bfloat16().to(values.dtype)


def embeddings(count: int, alike: float = 0.0) -> tuple[Tensor, Tensor]:
    """(B, D) images and texts of unit norm, with that cosine between those of a pair."""
    random = torch.Generator().manual_seed(0)
    image, other = (F.normalize(torch.randn(count, WIDTH, generator=random), dim=1) for _ in range(2))
    return image, F.normalize(alike * image + math.sqrt(1 - alike**2) * other, dim=1)


class Trial:
    """Inputs, and one call over them."""

    def __init__(self, batch: int, device: str) -> None:
        self.device = torch.device(device)
        torch.set_num_threads(1)
        compute_for(Precision(autocast="off"), self.device)
        self.leaves = [side.to(self.device).requires_grad_() for side in embeddings(batch)]
        for leaf in self.leaves:
            leaf.grad = torch.zeros_like(leaf)

    def run(self, loss: Loss) -> None:
        """Gradients are added to those that are there."""
        image, text = self.leaves
        loss(image, text, torch.tensor(SCALE, device=self.device)).sum().backward()

    def error(self, loss: Loss, reference: Loss, *, alike: float = 0.0, autocast: bool = False) -> float:
        """Relative error of the gradients at scale 100."""
        leaves = [side.to(self.device).requires_grad_() for side in embeddings(JUDGED, alike)]
        scale = torch.tensor(100.0, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            total = loss(leaves[0], leaves[1], scale)
        found = torch.cat(torch.autograd.grad(total, leaves)).double()
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        wanted = torch.cat(torch.autograd.grad(reference(exact[0], exact[1], scale.double()), exact))
        return float((found - wanted).norm() / wanted.norm())


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contrast", description=__doc__)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--loss", choices=sorted(BARS), default="itc")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="these implementations, with commas between")
    parser.add_argument("--memory", default="", help="print only the peak memory of this one")
    options = parser.parse_args(arguments)
    losses = implementations(options.loss)
    trial = Trial(options.batch, options.device)
    if options.memory:
        print(growth(lambda: trial.run(losses[options.memory]), trial.device))
        return 0
    chosen = options.only.split(",") if options.only else [name for name in losses if name != "bf16 wire"]
    calls = {name: lambda loss=losses[name]: trial.run(loss) for name in chosen}
    times = in_turns(calls, rounds=options.rounds, device=trial.device)
    memory = {name: in_own_process("benchmarks.contrast", [*arguments, "--memory", name]) for name in chosen}
    print(f"{options.loss}, {options.batch} pairs of {WIDTH}; errors: strangers, alike, autocast")
    for name in [*chosen, "bf16 wire"]:
        judged = ((0.0, False), (0.4, False), (0.0, True))
        errors = [trial.error(losses[name], losses["open_clip"], alike=a, autocast=b) for a, b in judged]
        cost = " " * 42
        if name in times:
            cost = (
                f"{statistics.median(times[name]):7.2f} s ({ratio(times['medley'], times[name]):.2f})  "
                f"{memory[name]:6.0f} MB (1/{memory[name] / memory['medley']:.1f})"
            )
        print(f"{name:18} {cost:42} {'  '.join(f'{error:.1e}' for error in errors)}")
    beside, time, share = BARS[options.loss]
    if beside not in chosen:
        return 0
    met = ratio(times["medley"], times[beside]) <= time and memory["medley"] <= share * memory[beside]
    print(f"bars of time {time:g} and memory 1/{1 / share:g} beside {beside}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
