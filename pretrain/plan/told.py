"""A plan in words: one column for each stage and resolution."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.config import Run
from pretrain.plan.gpus import GB, ROOM, Gpu, gpu_called
from pretrain.plan.inputs import Input
from pretrain.plan.leg import Leg
from pretrain.plan.wanted import Wanted
from pretrain.tables import millions, share

_TB = 1e12
_HOUR = 3600.0
Row = tuple[str, ...]


def told(run: Run, wanted: Wanted, inputs: Sequence[Input], legs: Sequence[Leg]) -> list[str]:
    """The lines to print."""
    gpu = gpu_called(wanted.gpu)
    machines = -(-wanted.gpus // wanted.gpus_per_node)
    lengths = "; ".join(f"{each.name}: {_tokens(each)}" for each in inputs if each.holds != "images")
    seconds = [max(_computing(leg, gpu, wanted), _sending(leg, gpu)) for leg in legs]
    hours = sum(leg.steps * each for leg, each in zip(legs, seconds, strict=True)) / _HOUR
    samples = sum(leg.samples for leg in legs)
    rows = [
        *_work(legs, inputs),
        *_memory(legs, gpu),
        *_wire(legs, gpu),
        *_time(legs, seconds, wanted),
        *_disk(run, legs, seconds, wanted, inputs),
    ]
    return [
        f"planned for {wanted.gpus:,} x {wanted.gpu} on {machines:,} machine{'s' * (machines > 1)}, "
        f"{wanted.utilisation:.0%} of {gpu.flops / 1e12:,.0f} TFLOP/s each; nothing was trained",
        f"captions in tokens, start and end counted: {lengths or 'none'}",
        "",
        *_columns(["", *(f"{leg.name}, {leg.resolution} px" for leg in legs)], rows),
        "",
        f"all together: {hours:,.3g} hours, {hours * wanted.gpus:,.6g} GPU-hours, {samples:,} samples, "
        f"{_together(legs, inputs)}",
        *_held_up(legs, gpu, wanted),
        *_notes(legs),
    ]


def _work(legs: Sequence[Leg], inputs: Sequence[Input]) -> list[Row]:
    found = legs[0].found
    parts = found.parts.items()
    return [
        ("parameters, of which train",),
        *((f"  {name}", *(_both(leg.found.parts[name]) for leg in legs)) for name, _ in parts),
        ("  all", *(_both(_whole(leg)) for leg in legs)),
        ("a step",),
        ("  batch", *(f"{leg.batch:,}" for leg in legs)),
        ("  micro-batches x samples a GPU", *(f"{leg.pieces} x {leg.micro_batch:,}" for leg in legs)),
        ("  PFLOP, all GPUs", *(f"{_all(leg) / 1e15:,.4g}" for leg in legs)),
        ("  GFLOP a sample", *(f"{_all(leg) / leg.batch / 1e9:,.5g}" for leg in legs)),
        ("  run twice to save memory", *(f"{_again(leg):.0%}" for leg in legs)),
        ("  image tokens", *(_count(leg.batch * leg.found.image_tokens) for leg in legs)),
        ("  text tokens", *(_count(leg.batch * _text(leg, inputs)) for leg in legs)),
        ("samples", *(f"{leg.samples:,}" for leg in legs)),
        ("  steps", *(f"{leg.steps:,}" for leg in legs)),
        *(
            (f"  passes over {_named(each, inputs)}", *(_passes([leg], each) for leg in legs))
            for each in inputs
        ),
    ]


def _memory(legs: Sequence[Leg], gpu: Gpu) -> list[Row]:
    rows: list[Row] = []
    for way in legs[0].peaks:
        accounts = [leg.peaks[way] for leg in legs]
        if any(isinstance(each, str) for each in accounts):
            rows.append((f"GB on a GPU, {way}: {next(each for each in accounts if isinstance(each, str))}",))
            continue
        rows.append((f"GB on a GPU at the fullest moment, {way}",))
        causes = dict.fromkeys(cause for each in accounts for cause in each if cause)
        rows += [(f"  {cause}", *(f"{_size(each, cause):,.2f}" for each in accounts)) for cause in causes]
        totals = [sum(each.values()) for each in accounts if not isinstance(each, str)]
        rows.append(("  all", *(f"{total / GB:,.2f}" for total in totals)))
        fits = ["yes" if total <= ROOM * gpu.memory else "NO" for total in totals]
        rows.append((f"  fits {ROOM:.0%} of {gpu.memory / GB:.0f} GB", *fits))
    return [*rows, ("  largest micro-batch that does", *(f"{leg.largest:,}" for leg in legs))]


def _wire(legs: Sequence[Leg], gpu: Gpu) -> list[Row]:
    rows: list[Row] = [("GB sent by a GPU in a step",)]
    pairs = dict.fromkeys(pair for leg in legs for pair in leg.found.sent)
    for cause, way in pairs:
        speed = getattr(gpu, way)
        sent = [leg.found.sent.get((cause, way), 0) for leg in legs]
        cells = (f"{each / GB:,.3g} ({each / speed * 1e3:,.3g} ms)" for each in sent)
        label = f"  {cause}, {'in the machine' if way == 'node' else 'between machines'}"
        rows.append((f"{label} at {speed / GB:.0f} GB/s", *cells))
    return rows if pairs else []


def _time(legs: Sequence[Leg], seconds: Sequence[float], wanted: Wanted) -> list[Row]:
    both = list(zip(legs, seconds, strict=True))
    speeds = [leg.batch / wanted.gpus / each for leg, each in both]
    return [
        ("time",),
        ("  ms a step", *(f"{each * 1e3:,.4g}" for each in seconds)),
        ("  samples/s a GPU", *(f"{each:,.4g}" for each in speeds)),
        ("  hours", *(f"{leg.steps * each / _HOUR:,.4g}" for leg, each in both)),
        ("  GPU-hours", *(f"{leg.steps * each / _HOUR * wanted.gpus:,.6g}" for leg, each in both)),
        (
            f"loader cores a GPU, {wanted.images_per_core:,.0f} images/s each",
            *(f"{each / wanted.images_per_core:,.2g}" for each in speeds),
        ),
    ]


def _disk(
    run: Run, legs: Sequence[Leg], seconds: Sequence[float], wanted: Wanted, inputs: Sequence[Input]
) -> list[Row]:
    sizes = [sum(leg.found.kept.values()) for leg in legs]
    writes = [size / (wanted.disk_speed * GB) for size in sizes]
    every = [run.cadence.checkpoint * each for each in seconds]
    rows: list[Row] = [
        (f"a checkpoint every {run.cadence.checkpoint:,} steps",),
        ("  GB", *(f"{size / GB:,.3g}" for size in sizes)),
        ("  minutes between", *(f"{each / 60:,.3g}" for each in every)),
        (
            f"  s to write at {wanted.disk_speed:g} GB/s (of the time)",
            *(f"{write:,.3g} ({write / each:.1%})" for write, each in zip(writes, every, strict=True)),
        ),
        (
            "  GB on disk",
            *(f"{size * _kept(run, leg) / GB:,.4g}" for size, leg in zip(sizes, legs, strict=True)),
        ),
    ]
    there = [each for each in inputs if each.shards and each.samples]
    if there:
        shards = [sum(each.shards * _read(leg, each) for each in there) for leg in legs]
        held = [sum(each.bytes * _read(leg, each) for each in there) for leg in legs]
        rows.append(("shards read", *(f"{each:,.5g}" for each in shards)))
        rows.append(("TB read", *(f"{each / _TB:,.4g}" for each in held)))
    return rows


def _kept(run: Run, leg: Leg) -> int:
    """Checkpoints that stay, and the one that is being written."""
    forever = leg.steps // run.cadence.keep_every if run.cadence.keep_every else 0
    return run.cadence.keep + forever + 1


def _notes(legs: Sequence[Leg]) -> list[str]:
    slow = [leg.name for leg in legs if not leg.largest]
    notes = ["memory is that of tensors when most are alive: gradients that come later are not among them"]
    return [
        *notes,
        *(f"{name}: not even one sample fits; shard (--parallel fsdp) or recompute" for name in slow),
    ]


def _columns(heads: Sequence[str], rows: Sequence[Row]) -> list[str]:
    widths = [
        max(len(row[at]) for row in (heads, *rows) if len(row) > max(at, 1)) for at in range(len(heads))
    ]
    lines = []
    for row in (heads, *rows):
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip())
    return lines


def _computing(leg: Leg, gpu: Gpu, wanted: Wanted) -> float:
    """Seconds of a step's FLOPs."""
    return leg.flops / (wanted.utilisation * gpu.flops)


def _sending(leg: Leg, gpu: Gpu) -> float:
    """Seconds of what a step sends: inside the machine and to others go different ways at once."""
    ways = {way: 0.0 for _, way in leg.found.sent}
    for (_, way), size in leg.found.sent.items():
        ways[way] += size / getattr(gpu, way)
    return max(ways.values(), default=0.0)


def _held_up(legs: Sequence[Leg], gpu: Gpu, wanted: Wanted) -> list[str]:
    """Where sending takes longer than computing."""
    slow = [leg for leg in legs if _sending(leg, gpu) > _computing(leg, gpu, wanted)]
    said = (
        f"{leg.name}, {leg.resolution} px ({_computing(leg, gpu, wanted) * 1e3:,.3g} ms of computing, "
        f"{_sending(leg, gpu) * 1e3:,.3g} ms of sending: {leg.flops / gpu.flops / _sending(leg, gpu):.1%} of "
        "the peak is left)"
        for leg in slow
    )
    return [f"the network holds up {'; '.join(said)}"] if slow else []


def _all(leg: Leg) -> float:
    """FLOPs of a step on all GPUs."""
    return leg.flops * leg.batch / (leg.pieces * leg.micro_batch)  # as often as there are GPUs


def _again(leg: Leg) -> float:
    return leg.found.flops.get("again", 0) * leg.micro_batch / leg.ran / leg.flops


def _read(leg: Leg, source: Input) -> float:
    """How often a stretch reads all of a source that has an end."""
    return leg.samples * leg.shares.get(source.name, 0.0) / (source.samples or 1)


def _passes(legs: Sequence[Leg], source: Input) -> str:
    return "-" if source.samples is None else f"{sum(_read(leg, source) for leg in legs):,.3g}"


def _named(source: Input, inputs: Sequence[Input]) -> str:
    return source.name if len(inputs) > 1 else "the data"


def _together(legs: Sequence[Leg], inputs: Sequence[Input]) -> str:
    if len(inputs) == 1:
        return f"{_passes(legs, inputs[0])} passes"
    return "passes over " + ", ".join(f"{each.name} {_passes(legs, each)}" for each in inputs)


def _text(leg: Leg, inputs: Sequence[Input]) -> float:
    """Text tokens of a sample."""
    there = [each for each in inputs if each.holds != "images"]
    return sum(leg.shares.get(each.name, 0.0) * sum(each.lengths) / len(each.lengths) for each in there)


def _tokens(each: Input) -> str:
    mean = sum(each.lengths) / len(each.lengths)
    return f"{mean:.3g} on average, up to {max(each.lengths)}, {each.told}"


def _size(account: object, cause: str) -> float:
    return account.get(cause, 0) / GB if isinstance(account, dict) else 0.0


def _whole(leg: Leg) -> tuple[int, int]:
    sizes = leg.found.parts.values()
    return sum(size for size, _ in sizes), sum(trained for _, trained in sizes)


def _both(sizes: tuple[int, int]) -> str:
    return f"{millions(sizes[0])}, {share(sizes[1], sizes[0])}"


def _count(number: float) -> str:
    return f"{number / 1e6:,.4g} M" if number >= 1e6 else f"{number:,.0f}"
