"""What a run would do and cost, told before it does it: `python -m pretrain.launch --explain ...`.

What it reads is what the run itself reads: the declarations of the objectives, and a forward and backward of
a few samples of its first batch. No run directory is made or changed; the stages are drawn beside it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from datasets.batch import Batch
from datasets.loader import Loader
from datasets.tokens import Tokenizer
from datasets.weights import weight_at
from objectives.base import Objective
from pretrain.blocks import blocks_of, recompute
from pretrain.build import build_pretrainer, build_tokenizer, feeds_in, train_only
from pretrain.cli import Command
from pretrain.clipping import by_part
from pretrain.config import Run
from pretrain.costs import TOWERS, Bench, Cost, few
from pretrain.curriculum import Curriculum, Stretch
from pretrain.data import Data
from pretrain.distributed import Ranks
from pretrain.optim import Optim, build_optimizer, bytes_kept
from pretrain.precision import compute_for, keep_in_bf16
from pretrain.pretrainer import Pretrainer
from pretrain.rundir import RunDir
from pretrain.stage import Stage
from pretrain.tables import giga, many, millions, share, table
from pretrain.timeline import Row, described, draw, rows_of

_SAMPLES = 16
"""Of a step that is measured, about."""
_MIB = 2**20
_HEADS = (
    *("objective", "reads", "across samples", "weight", "parameters"),
    *("GFLOP alone", "GFLOP it adds", "MiB held alone"),
)


def summary(pretrainer: Pretrainer) -> list[str]:
    """Two lines: who reads what, and how much there is to train."""
    reads = "; ".join(f"{name} reads {_passes(each)}" for name, each in pretrainer.objectives.items())
    whole, trained = _size(pretrainer)
    parts = ", ".join(f"{part} {millions(size)}" for part, (size, _) in by_part(pretrainer).items())
    return [
        f"passes: {reads}",
        f"parameters: {millions(whole)} ({parts}), {share(trained, whole)} trained",
    ]


def explain(command: Command, curriculum: Curriculum, data: Data, ranks: Ranks) -> list[str]:
    """The lines to print. All ranks call it together."""
    run = command.run
    compute = compute_for(run.precision, ranks.device)
    with _tokenizer_dir(command, ranks) as rundir:
        tokenizer = build_tokenizer(run, data.feeds, rundir, ranks)
    first = curriculum.of_stage(command.stage)[0] if command.stage else curriculum.stretches[0]
    pretrainer = build_pretrainer(run, tokenizer, ranks, load=False, feeds=data.objectives[first.name])
    _keep_less(run, pretrainer)
    lanes = run.shuffle.lanes if run.deterministic == "elastic" else None
    batches = _first_batches(run, first, data, tokenizer, ranks)
    rows = rows_of(run, curriculum, pretrainer, data.objectives, text_tokens=_words(batches))
    train_only(pretrainer, run, first.name)
    size = max(2, _SAMPLES // len(batches))
    bench = Bench(
        pretrainer=pretrainer,
        feeds=data.objectives[first.name],
        batches=[few(batch, size).to(ranks.device) for batch in batches],
        ranks=ranks,
        compute=compute,
        pool=run.pool,
        lanes=lanes,
        seed=run.seed,
    )
    names = pretrainer.fed()
    whole = bench.measure(names)
    alone = {name: whole if len(names) == 1 else bench.measure([name]) for name in names}
    left = {name: _without(bench, names, name, alone) for name in names if len(names) > 1}
    largest = -(-first.batch // (ranks.world * len(batches)))
    return [
        f"{' + '.join(names)} on {run.data}: {curriculum.steps:,} steps, {curriculum.samples:,} samples"
        + (f"; what follows is of stage {first.name} as it begins" if len(run.stages) > 1 else ""),
        f"only told: nothing is trained, and {command.out} is left as it is",
        "",
        *table(
            _HEADS,
            [
                _objective(run, first.stage, pretrainer, each, whole=whole, alone=alone[each],
                           left=left.get(each), samples=largest)
                for each in names
            ],
        ),
        "  GFLOP of a sample, forward and backward. Alone, an objective pays for all that it reads; what it",
        "  adds is what a step saves without it, since towers that others read too run once for all of them.",
        *remarks(pretrainer),
        "",
        *table(("part", "parameters", "trained", "forward runs a step"), _towers(pretrainer, whole)),
        "",
        *_step(first, batches, ranks, whole),
        *_memory(first.stage.optim, pretrainer, whole, largest),
        *_spread(run, ranks, bf16=compute.bf16),
        "",
        "sources",
        *data.described(first),
        "",
        *_stages(command, rows, ranks),
    ]  # fmt: skip


def remarks(pretrainer: Pretrainer) -> list[str]:
    """What a user should know of some objectives in this run."""
    return [f"{name}: {each.remark}" for name, each in pretrainer.objectives.items() if each.remark]


def _keep_less(run: Run, pretrainer: Pretrainer) -> None:
    if run.precision.parameters == "bf16":
        keep_in_bf16(pretrainer)
    if run.spread.activation_checkpointing:
        recompute(blocks_of(pretrainer.model))


def _stages(command: Command, rows: Sequence[Row], ranks: Ranks) -> list[str]:
    """The timeline as a table, and as a picture beside the run directory."""
    picture = command.out.with_name(f"{command.out.name}-timeline.png")
    drawn = f"drawn in {picture}"
    if ranks.zero:
        try:
            draw(rows, picture)
        except OSError as error:  # all that matters has been told
            drawn = f"not drawn in {picture}: {error.strerror}"
    return [*described(rows), drawn]


def _words(batches: Sequence[Batch]) -> float:
    """Tokens of the texts of a sample, on average."""
    return sum(float(each.text_length.sum()) for each in batches) / sum(len(each.keys) for each in batches)


def _without(bench: Bench, names: Sequence[str], name: str, alone: Mapping[str, Cost]) -> Cost:
    others = [each for each in names if each != name]
    return alone[others[0]] if len(others) == 1 else bench.measure(others)


@contextmanager
def _tokenizer_dir(command: Command, ranks: Ranks) -> Generator[RunDir]:
    """The run's directory if its tokenizer is there to be read, else one that is gone afterwards."""
    own = RunDir(command.out)
    if ranks.on_zero(own.tokenizer.exists):
        yield own
        return
    folder = ranks.on_zero(tempfile.mkdtemp)
    try:
        yield RunDir(Path(folder))
    finally:
        ranks.on_zero(lambda: shutil.rmtree(folder))


def _first_batches(
    run: Run, first: Stretch, data: Data, tokenizer: Tokenizer, ranks: Ranks
) -> Sequence[Batch]:
    """This rank's micro-batches of a first step; of one source, no more samples than are looked at."""
    lanes = run.shuffle.lanes
    pieces = lanes // ranks.world if run.deterministic == "elastic" else first.micro_batches
    batch = first.batch
    if len(data.feeds) == 1 and run.deterministic != "elastic":
        batch = min(batch, ranks.world * max(_SAMPLES, 2 * pieces))
    loader = Loader(
        feeds_in(first, data.feeds),
        tokenizer,
        seed=run.seed,
        batch=batch,
        rank=ranks.rank,
        ranks=ranks.world,
        micro_batches=pieces,
        resolution=first.resolution,
        augment=first.stage.augment,
        threads=run.loader_threads,
        shuffle=run.shuffle,
    )
    (portion,) = loader.steps(first.first, first.first + 1)
    return portion.batches


def _objective(
    run: Run,
    stage: Stage,
    pretrainer: Pretrainer,
    name: str,
    *,
    whole: Cost,
    alone: Cost,
    left: Cost | None,
    samples: int,
) -> list[str]:
    objective, own = pretrainer.objectives[name], run.objectives[name].weight
    across = "pairs drawn" if objective.draws else "contrast" if objective.coupled else "no"
    fixed, each = alone.held
    return [
        name,
        _passes(objective),
        across,
        f"{weight_at(stage.objectives.get(name, own), 0):g}",
        millions(sum(one.numel() for one in objective.parameters())),
        giga(alone.flops),
        giga(whole.flops - left.flops) if left else giga(whole.flops),
        f"{(fixed + each * samples) / _MIB:,.0f}",
    ]


def _passes(objective: Objective) -> str:
    """What an objective reads, and in which views where they are not the clean ones."""
    told: list[str] = []
    for wanted in objective.passes:
        views = [
            f"{view} {kind}"
            for kind, view in (("image", wanted.image), ("text", wanted.text))
            if view not in ("clean", "none")
        ]
        told.append(wanted.what + (f" ({', '.join(views)})" if views else ""))
    return ", ".join(told)


def _towers(pretrainer: Pretrainer, whole: Cost) -> list[list[str]]:
    rows: list[list[str]] = []
    for part, (size, trained) in by_part(pretrainer).items():
        runs = str(whole.runs.get(part, 0)) if part in TOWERS else ""
        rows.append([part, millions(size), share(trained, size), runs])
    size, trained = _size(pretrainer)
    return [*rows, ["all", millions(size), share(trained, size), ""]]


def _step(first: Stretch, batches: Sequence[Batch], ranks: Ranks, whole: Cost) -> list[str]:
    """What a process does in a step of the first stretch."""
    own = first.batch / ranks.world
    again = f", and {giga(own * whole.again)} again to save memory" if whole.again else ""
    return [
        f"step: {first.batch:,} samples on {many(ranks.world, 'process')}, "
        f"{many(len(batches), 'micro-batch')} on each",
        f"  {giga(own * whole.flops)} GFLOP on each ({giga(whole.flops)} a sample){again}",
    ]


def _memory(optim: Optim, pretrainer: Pretrainer, whole: Cost, samples: int) -> list[str]:
    weights = sum(each.nbytes for each in pretrainer.parameters())
    gradients = sum(each.nbytes for each in pretrainer.parameters() if each.requires_grad)
    moments = moment_bytes(optim, pretrainer)
    fixed, each = whole.held
    held = fixed + each * samples
    total = weights + moments + gradients + held
    return [
        f"memory: about {total / _MIB:,.0f} MiB of tensors on each, without what sharding saves",
        f"  weights {weights / _MIB:,.0f}, gradients {gradients / _MIB:,.0f}, moments {moments / _MIB:,.0f}, "
        f"held between forward and backward {held / _MIB:,.0f} for {many(samples, 'sample')}",
        "  held is counted on some samples and scaled; kernels need more for themselves",
    ]


def moment_bytes(optim: Optim, pretrainer: Pretrainer) -> int:
    """What the optimizer of the first stage keeps."""
    return bytes_kept(build_optimizer(pretrainer, optim), optim.kind)


def _spread(run: Run, ranks: Ranks, *, bf16: bool) -> list[str]:
    processes = many(ranks.world, "process") + (f", {run.spread.parallel}" if ranks.group else "")
    marks = [
        f"bf16 autocast over {run.precision.parameters} parameters" if bf16 else "float32",
        *(["activations computed twice"] if run.spread.activation_checkpointing else []),
        *(["compiled by block"] if run.spread.compile else []),
        *(["offloaded to the host"] if run.spread.offload else []),
        *(["elastic"] if run.deterministic == "elastic" else []),
    ]
    return [f"spread: {processes} on {ranks.device.type}, {', '.join(marks)}"]


def _size(module: nn.Module) -> tuple[int, int]:
    sizes = [(each.numel(), each.numel() * each.requires_grad) for each in module.parameters()]
    return sum(size for size, _ in sizes), sum(trained for _, trained in sizes)
