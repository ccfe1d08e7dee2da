"""What cutting a batch into micro-batches saves and costs: peak memory and CPU time of a step.

    python -m benchmarks.microbatches [--steps 1] [-- --objectives itc,itm,lm --stages.one.batch 256]

A step in 1, 2, 4 or 8 micro-batches has the same gradient. Where samples see each other (itc, siglip, itm
beside one of them) each micro-batch is encoded once more, without gradient. For each number a process of its
own builds the run that stands behind `--` (by default itc, itm and lm on the built-in scenes, 256 a batch),
takes a step over four samples to warm up, and counts over the next ones: CPU time, and the most memory beyond
what it held before (VmHWM, Linux; in a process where nothing freed and no kernel is kept). It prints also how
often the towers ran.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time

import torch

from datasets.batch import Batch
from datasets.loader import Feed, Loader
from datasets.sources import open_source
from datasets.tokens import TrainedBPE
from pretrain.build import build_pretrainer
from pretrain.bystep import held_at
from pretrain.cli import parse
from pretrain.distributed import Ranks
from pretrain.parallel import wrap
from pretrain.precision import compute_for
from pretrain.step import Setup, agree, backward
from pretrain.zoo.models import DualConfig

NUMBERS = (1, 2, 4, 8)
DEFAULT = ("--objectives", "itc,itm,lm", "--stages.one.batch", "256")
FRUGAL = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1",
}
"""Memory goes back when it is freed, and kernels are not kept for every shape: what is held are tensors."""
TOWERS = ("image", "text", "fusion", "captioner")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one step."""

    megabytes: float
    """The most that was held beyond what was held before."""
    cpu_seconds: float
    runs: dict[str, int]
    """How often each tower ran."""


def measure(flags: Sequence[str], *, micro_batches: int, steps: int) -> Cost:
    """Take steps of a run, in this process.

    Args:
        flags: of pretrain.launch.
        micro_batches: into which each batch is cut.
        steps: that are counted, after one that is not.
    """
    run = parse(flags).run
    stage = next(iter(run.stages.values()))
    batch, resolution = held_at(stage.batch, 0), held_at(stage.resolution, 0)
    source = open_source(run.data, seed=run.seed, split="train")
    captions = (caption for index in range(2000) for caption in source.captions(index))
    assert isinstance(run.model, DualConfig), "the built-in kind of model"
    context = run.model.text.context_length
    tokenizer = TrainedBPE.train(captions, vocabulary=run.vocabulary, context_length=context)
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
    pretrainer = build_pretrainer(run, tokenizer, ranks)
    runs = _counted(pretrainer.model)
    setup = Setup(wrapped=wrap(pretrainer, ranks), compute=compute_for(run.precision, ranks.device))

    def batches_of(size: int, pieces: int) -> Iterator[Sequence[Batch]]:
        feeds = [Feed(name="data", source=source)]
        loader = Loader(
            feeds, tokenizer, seed=run.seed, batch=size, micro_batches=pieces, resolution=resolution
        )
        return (portion.batches for portion in loader.steps(0, steps))

    def step(batches: Sequence[Batch]) -> None:
        counts = agree(setup, batches).counts
        factors = {name: 1.0 / count.clamp(min=1) for name, count in counts.items()}
        backward(setup, batches, factors, key=(run.seed, 0))

    step(next(iter(batches_of(4, 2))))  # what is made once: kernels, gradients
    portions = list(batches_of(batch, micro_batches))
    _CLEAR.write_text("5")  # the high-water mark begins anew
    held, began, ran = _kilobytes("VmRSS"), process_time(), dict(runs)
    for batches in portions:
        step(batches)
    return Cost(
        (_kilobytes("VmHWM") - held) / 1e3,
        (process_time() - began) / steps,
        {name: (count - ran[name]) // steps for name, count in runs.items()},
    )


def _counted(model: torch.nn.Module) -> dict[str, int]:
    """Counts how often each tower runs from now on; the text tower's runs include those of fusion."""
    towers = {name: getattr(model, name) for name in TOWERS if getattr(model, name) is not None}
    runs = dict.fromkeys(towers, 0)
    for name, tower in towers.items():
        tower.register_forward_hook(lambda *_, name=name: runs.__setitem__(name, runs[name] + 1))
    return runs


def _kilobytes(name: str) -> int:
    return int(_STATUS.read_text().partition(f"{name}:")[2].split()[0])


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    given = list(arguments)
    at = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.microbatches", description=__doc__)
    parser.add_argument("--steps", type=int, default=1, help="steps that are counted")
    parser.add_argument("--only", type=int, help="measure this number of micro-batches, in this process")
    options = parser.parse_args(given[:at])
    flags = given[at + 1 :] or DEFAULT
    if options.only is not None:
        print(json.dumps(asdict(measure(flags, micro_batches=options.only, steps=options.steps))))
        return 0
    print(" ".join(flags), flush=True)
    for number in NUMBERS:
        here = ["--steps", str(options.steps), "--only", str(number), "--", *flags]
        held, timed = _child(here, {**os.environ, **FRUGAL}), _child(here, os.environ)
        ran = ", ".join(f"{name} {count}" for name, count in timed.runs.items())
        print(
            f"{number} micro-batches: {held.megabytes:.0f} MB, {timed.cpu_seconds:.2f} CPU s a step; {ran}",
            flush=True,
        )
    return 0


def _child(arguments: Sequence[str], environment: Mapping[str, str]) -> Cost:
    command = [sys.executable, "-m", "benchmarks.microbatches", *arguments]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
