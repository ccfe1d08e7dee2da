"""One optimizer step beside open_clip's: the same weights, images, captions, batch and optimizer settings.

    python -m benchmarks.step [--model ViT-S-32] [--batch 16] [--rounds 5] [--data SHARDS] [--device cuda]

Medley runs its own `train_step` of the objective itc, once with texts as long as the longest (`unpadded`) and
once with as many tokens as open_clip (`padded`). open_clip runs what its `train_one_epoch` does in a step:
`create_model`, `ClipLoss`, AdamW as `open_clip_train` builds it, autocast where it is bf16, torch's own
choice of float32 kernels. Its images are normalised before; ours are bytes. Captions are those of --data, or
words drawn at random, 10 to 20 a caption. The losses of the first two steps, and with them gradients and
updates, are compared before anything is timed. On an accelerator the share of the peak of matmuls is told
as well, and there are no bars; on a CPU the exit code is 1 where one is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from math import log
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.beside import in_turns, ratio
from datasets.batch import Batch, sample_id
from datasets.sources import open_source
from datasets.tokens import OpenClipTokens
from objectives.itc import ITC
from pretrain.build import build_pretrainer
from pretrain.config import Run, Stage
from pretrain.distributed import Ranks
from pretrain.flops import Counter, counting, matmul_peak
from pretrain.optim import Optim, build_optimizer, set_rate
from pretrain.parallel import wrap
from pretrain.precision import Compute, Precision, compute_for
from pretrain.step import Setup, agree, train_step
from pretrain.zoo.models import OpenClipConfig

BARS = {("bf16", "unpadded"): 1.9, ("bf16", "padded"): 1.15, ("float32", "padded"): 1.45}
"""How many times faster than open_clip a step has to be on a CPU."""
CLOSE = {"bf16": 2e-2, "float32": 1e-5}
"""How far losses may be apart, relatively."""
OPTIM = Optim(lr=5e-4, warmup=0, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, clip=0.0)
_WORDS = [
    "a",
    "the",
    "dog",
    "man",
    "red",
    "two",
    "and",
    "on",
    "with",
    "of",
    "street",
    "runs",
    "ball",
    "small",
    "woman",
    "in",
    "water",
    "blue",
    "grass",
    "under",
]
_CONTEXT = 77


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--model", default="ViT-S-32", help="a model of open_clip with 77 tokens of context")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", default="", help="tar shards with captions")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arithmetic", default="", help="bf16 or float32; both on a CPU, bf16 elsewhere")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device(options.device)
    kinds = [options.arithmetic] if options.arithmetic else ["bf16", *["float32"] * (device.type == "cpu")]
    captions = read_captions(options.data, options.batch)
    met = True
    for kind in kinds:
        met &= compare(options.model, captions, kind=kind, rounds=options.rounds, device=device)
    return 0 if met else 1


def read_captions(data: str, count: int) -> list[str]:
    """The first captions of a source, or random words."""
    if data:
        source = open_source(data, seed=0, split="train", say=print)
        return [source.captions(index)[0] for index in range(count)]
    random = np.random.default_rng(0)
    return [" ".join(random.choice(_WORDS, random.integers(10, 21))) for _ in range(count)]


def compare(name: str, captions: Sequence[str], *, kind: str, rounds: int, device: torch.device) -> bool:
    """Print what a step takes in one arithmetic; whether the bars hold."""
    plain = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    compute = compute_for(Precision(autocast="bf16" if kind == "bf16" else "off"), device)
    chosen = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    images = torch.randint(256, (len(captions), 3, 224, 224), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    tokenizer = OpenClipTokens(context_length=_CONTEXT)
    texts = [tokenizer.encode(caption) for caption in captions]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "open_clip_model.safetensors"
        peer = Peer(name, images, texts, kind=kind, device=device, path=path)
        longest = max(map(len, texts))
        ours = {
            label: Medley(name, batch_of(images, texts, columns), tokenizer, compute=compute, path=path)
            for label, columns in (("unpadded", longest), ("padded", _CONTEXT))
        }

    def theirs() -> float:
        torch.backends.mkldnn.matmul.fp32_precision = plain  # type: ignore[attr-defined]
        loss = peer.step()
        torch.backends.mkldnn.matmul.fp32_precision = chosen  # type: ignore[attr-defined]
        return loss

    calls: dict[str, Callable[[], float]] = {
        "open_clip": theirs,
        **{at: each.step for at, each in ours.items()},
    }
    losses = {at: [call() for _ in range(2)] for at, call in calls.items()}
    apart = max(abs(a - b) / b for at in ours for a, b in zip(losses[at], losses["open_clip"], strict=True))
    counter = Counter()
    with counting(counter, "step"):
        ours["padded"].step()
    times = in_turns(calls, rounds=rounds, device=device)
    peak = matmul_peak(compute) if device.type != "cpu" else 0.0
    print(f"{name}, {kind}, batch {len(captions)}, longest text {longest} tokens: losses {apart:.1e} apart")
    met = apart <= CLOSE[kind]
    for at, found in times.items():
        took, faster = statistics.median(found), 1 / ratio(found, times["open_clip"])
        share = f"  {counter.counts['step'] / took / peak:.1%} MFU" if peak and at != "unpadded" else ""
        bar = BARS.get((kind, at)) if device.type == "cpu" else None
        told = "" if bar is None else f"  bar {bar}: {'met' if faster >= bar else 'MISSED'}"
        print(f"  {at:10} {took:8.4f} s  {len(captions) / took:7.1f} samples/s  {faster:5.2f}x{share}{told}")
        met &= bar is None or faster >= bar
    return met


def batch_of(images: Tensor, texts: Sequence[Sequence[int]], columns: int) -> Batch:
    """Each image with its text, padded to `columns`."""
    count = len(texts)
    return Batch(
        images=images,
        image_valid=torch.ones(count, dtype=torch.bool),
        tokens=_padded(texts, columns),
        text_length=torch.tensor([len(text) for text in texts]),
        image_index=torch.arange(count),
        text_valid=torch.ones(count, dtype=torch.bool),
        text_id=torch.arange(count),  # also where two captions are equal: open_clip does not look
        boxes=torch.zeros(count, 4),
        box_valid=torch.zeros(count, dtype=torch.bool),
        keys=tuple(map(str, range(count))),
        sample_id=torch.tensor([sample_id("data", str(number)) for number in range(count)]),
    )


def _padded(texts: Sequence[Sequence[int]], columns: int) -> Tensor:
    return torch.tensor([[*text, *[0] * (columns - len(text))] for text in texts])


class Medley:
    """Our step."""

    def __init__(
        self, name: str, batch: Batch, tokenizer: OpenClipTokens, *, compute: Compute, path: Path
    ) -> None:
        """Build it with the weights in a file."""
        run = Run(
            model=OpenClipConfig(name=name, pretrained=str(path)),
            objectives={"itc": ITC.Config()},
            stages={"one": Stage(resolution=batch.images.shape[-1], optim=OPTIM)},
        )
        ranks = Ranks(rank=0, world=1, device=compute.device, group=None)
        pretrainer = build_pretrainer(run, tokenizer, ranks)
        self.setup = Setup(wrapped=wrap(pretrainer, ranks), compute=compute)
        self.optimizer = build_optimizer(pretrainer, OPTIM)
        set_rate(self.optimizer, OPTIM, step=0, steps=1)
        self.batch = batch.to(compute.device)

    def step(self) -> float:
        """One step; its loss."""
        counts = agree(self.setup, [self.batch]).counts
        report = train_step(
            self.setup,
            [self.batch],
            self.optimizer,
            counts=counts,
            weights={"itc": 1.0},
            largest_norm=0.0,
            key=(0, 0),
        )
        return report.values["loss"].item()


class Peer:
    """open_clip's step (open_clip_train/train.py, train_one_epoch; the optimizer of main.py)."""

    def __init__(
        self,
        name: str,
        images: Tensor,
        texts: Sequence[Sequence[int]],
        *,
        kind: str,
        device: torch.device,
        path: Path,
    ) -> None:
        """Build it, and write the weights that it begins with to a file."""
        torch.manual_seed(0)
        self.model: nn.Module = open_clip.create_model(name, output_dict=True, device=device)
        self.scale = dict(self.model.named_parameters())["logit_scale"]
        save_file({key: value.cpu().clone() for key, value in self.model.state_dict().items()}, path)
        self.loss = open_clip.ClipLoss()
        mean, std = (
            255 * torch.tensor(each).view(3, 1, 1)
            for each in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        self.images = ((images - mean) / std).to(device)
        self.texts = _padded(texts, _CONTEXT).to(device)
        plain: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        for key, value in self.model.named_parameters():
            small = value.ndim < 2 or "bn" in key or "ln" in key or "bias" in key or "logit_scale" in key
            (plain if small else decayed).append(value)
        self.optimizer = torch.optim.AdamW(
            [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": OPTIM.weight_decay}],
            lr=OPTIM.lr,
            betas=OPTIM.betas,
            eps=OPTIM.eps,
        )
        self.cast = torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16")

    def step(self) -> float:
        """One step; its loss."""
        self.optimizer.zero_grad()
        with self.cast:
            said = self.model(self.images, self.texts)
            total: Tensor = self.loss(**said, output_dict=True)["contrastive_loss"]
        total.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.scale.clamp_(0, log(100))
        return total.item()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
