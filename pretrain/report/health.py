"""How a run stands, what it took, and what interrupted it."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree.ElementTree import Element

import numpy as np

from pretrain.report.collect import RunData
from pretrain.report.markup import Child, node, table
from pretrain.report.timing import Timing, timing
from pretrain.report.words import count, date, duration, share

_PARTS = {
    "getting data": "perf/part/data",
    "forward": "perf/part/forward",
    "backward": "perf/part/backward",
    "optimizer": "perf/part/optimizer",
    "waiting for other ranks": "perf/part/wait",
}


def facts(run: RunData) -> dict[str, Child]:
    """What there is to know at a glance."""
    if run.finished:
        state = node("span", "finished", class_="finished")
    else:
        words = f"at step {run.step:,} of {run.steps:,}" if run.step else "no report yet"
        state = node("span", words, class_="unfinished")
    found: dict[str, Child] = {"State": state, "Samples seen": count(run.samples)}
    took = timing(run)
    if took is not None:
        found["Wall time"] = duration(took.total)
    if "time" in run.series:
        found["Newest report"] = date(run.series["time"].values[-1])
    left = run.last("perf/seconds_left")
    if left is not None and not run.finished:
        alone = run.starts and run.starts[-1].alone  # and then it counts to the end of that stage
        found[f"Time left of stage {run.starts[-1].stage}" if alone else "Time left"] = duration(left)
    if isinstance(run.config.get("objectives"), dict):
        found["Objectives"] = ", ".join(map(str, run.config["objectives"]))
    sources = run.config.get("sources")
    if isinstance(sources, dict):
        found["Data"] = ", ".join(
            f"{name}: {each.get('data')} as {each.get('holds')}" if isinstance(each, dict) else str(name)
            for name, each in sources.items()
        )
    if run.starts:
        ranks, device = run.starts[-1].ranks, run.starts[-1].device
        found["Trained on"] = f"{device}, {ranks} process{'es' if ranks > 1 else ''}"
    return found


def vitals(run: RunData) -> dict[str, Child]:
    """Timing and data health."""
    found: dict[str, Child] = {}
    measured: dict[str, tuple[str, Callable[[np.ndarray], float], Callable[[float], str]]] = {
        "samples per second, median": ("perf/samples_per_second", np.median, count),
        "share of time waiting for data, mean": ("perf/data_wait", np.mean, share),
        "seconds per step, median": ("perf/step_seconds_p50", _newest, "{:.3g}".format),
        "seconds per step, 99th percentile": ("perf/step_seconds_p99", _newest, "{:.3g}".format),
        "share of the measured matmul peak (MFU), median": ("perf/mfu", np.median, "{:.1%}".format),
        "TFLOP/s of a process, median": ("perf/tflops", np.median, "{:.3g}".format),
        "memory, most, GiB": ("perf/memory_gib", np.max, "{:.3g}".format),
    }
    for label, (name, summary, words) in measured.items():
        if name in run.series:
            found[label] = words(float(summary(run.series[name].values)))
    found |= _parts(run) | _reading(run)
    took = timing(run)
    if took is not None:
        found["restarts"] = _restarts(run, took)
        found["goodput: training time of total time"] = _goodput(took)
    masked = run.last("data/masked")
    if masked is not None:
        found["samples that could not be read"] = count(masked) + (
            f" ({share(masked / run.samples)} of those seen{_kinds(run)})" if masked else ""
        )
    return found


def _parts(run: RunData) -> dict[str, Child]:
    """What the time of a step went into, in means over all reports, and which rank held the others up."""
    means = {
        part: float(np.mean(run.series[name].values)) for part, name in _PARTS.items() if name in run.series
    }
    found: dict[str, Child] = {}
    if means:
        found["of a step's time, mean"] = ", ".join(f"{part} {share(mean)}" for part, mean in means.items())
    if "perf/slowest_rank" in run.series:
        ranks, times = np.unique(run.series["perf/slowest_rank"].values, return_counts=True)
        often = int(ranks[times.argmax()])
        factor = float(np.median(run.series["perf/slowest_rank_factor"].values))
        found["slowest rank, most often"] = f"rank {often}; the slowest takes {factor:.2f} times the median"
    return found


def _reading(run: RunData) -> dict[str, Child]:
    """What the data have cost on the way to the model, in medians over all reports."""

    def median(name: str) -> float | None:
        return float(np.median(run.series[name].values)) if name in run.series else None

    found: dict[str, Child] = {}
    queue = median("data/queue")
    if queue is not None:
        found["steps that lay ready, median"] = f"{queue:.1f}"
    for what, label in {"read": "read a part of a sample", "fetch": "fetch a range"}.items():
        middle, slow = median(f"data/{what}_ms_p50"), median(f"data/{what}_ms_p99")
        if middle is not None and slow is not None:
            found[f"ms to {label}, median and 99th percentile"] = f"{middle:.3g}, {slow:.3g}"
    decode = median("data/decode_ms_p50")
    if decode is not None:
        found["ms to decode an image, median"] = f"{decode:.3g}"
    hits = median("data/cache_hits")
    if hits is not None:
        found["reads found in the cache, median"] = share(hits)
    return found


def starts(run: RunData) -> Element | None:
    """Every start of a run that was interrupted."""
    took = timing(run)
    if took is None or len(run.starts) < 2:
        return None
    rows: list[list[Child]] = [
        [date(each.time), count(each.step), count(each.lost), duration(gap), f"{each.ranks} x {each.device}"]
        for each, gap in zip(run.starts, took.gaps, strict=True)
    ]
    return table(["start", "from step", "steps done again", "interrupted for", "trained on"], rows)


def _kinds(run: RunData) -> str:
    """How many of each kind, most first."""
    prefix = "data/masked/"
    counts = {
        name.removeprefix(prefix): run.last(name) or 0.0 for name in run.series if name.startswith(prefix)
    }
    ranked = sorted(counts.items(), key=lambda each: -each[1])
    return "".join(f"; {kind} {count(times)}" for kind, times in ranked)


def _newest(values: np.ndarray) -> float:
    return values[-1]


def _restarts(run: RunData, took: Timing) -> str:
    restarts = len(run.starts) - len({each.stage for each in run.starts})
    if not restarts:
        return "none"
    lost = count(sum(each.lost for each in run.starts))
    return f"{restarts}, {lost} steps done again, interrupted for {duration(took.interrupted)}"


def _goodput(took: Timing) -> Child:
    """The share in figures, and a bar of where the time went."""
    if took.total <= 0:
        return None
    parts = {
        "training": took.training,
        "starting, evaluating, saving": took.other,
        "interrupted": took.interrupted,
    }
    bar, words, at = node("svg", class_="bar", viewBox="0 0 100 1", preserveAspectRatio="none"), [], 0.0
    for place, (label, seconds) in enumerate(parts.items()):
        width = 100 * seconds / took.total
        bar.append(node("rect", class_=f"part-{place}", x=f"{at:.2f}", width=f"{width:.2f}", height="1"))
        if seconds:
            words += [node("i", class_=f"swatch part-{place}"), f"{label} {share(seconds / took.total)} "]
        at += width
    return node("span", share(took.training / took.total), bar, node("small", *words))
