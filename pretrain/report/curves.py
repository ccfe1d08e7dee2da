"""Which curves are drawn, and their points: smoothed, and thinned to what a screen can show.

n points of a series, m <= n of them kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pretrain.report.collect import RunData, Series
from pretrain.sinks.plots import smooth

_SMOOTHED_FROM = 40
"""Points from which a noisy series is drawn faint, under its moving average."""
_BUCKETS = 400
"""A thinned series keeps the least and the greatest value of each, and as many points of its average."""

_SECTIONS = {"train": "Loss", "eval": "Evaluation", "model": "Model", "perf": "Throughput", "data": "Data"}
_MOVED = {"train/lr": "Model", "perf/data_wait": "Data"}
_OTHER = "Other"
SECTIONS = (*_SECTIONS.values(), _OTHER)

_LOSS = "train/loss/"
_NOT_DRAWN = {"step", "time", "finished", "perf/seconds_left"}
_TITLES = {
    "train/loss": "loss, weighted sum",
    "train/lr": "learning rate",
    "train/skipped": "steps skipped",
    "eval/cider_d": "CIDEr-D",
    "eval/bleu_1": "BLEU-1",
    "eval/bleu_4": "BLEU-4",
    "eval/rouge_l": "ROUGE-L",
    "perf/samples_per_second": "samples per second",
    "perf/data_wait": "share of time waiting for data",
    "perf/step_seconds_p50": "seconds per step, median",
    "perf/step_seconds_p99": "seconds per step, 99th percentile",
    "perf/memory_gib": "memory, GiB",
    "perf/lost_steps": "steps done again",
    "data/masked": "samples that could not be read",
    "data/queue": "steps that lay ready",
    "data/read_ms_p50": "ms to read, median",
    "data/read_ms_p99": "ms to read, 99th percentile",
    "data/decode_ms_p50": "ms to decode, median",
    "data/cache_hits": "share of reads found in the cache",
    "data/fetch_ms_p50": "ms to fetch a range, median",
    "data/fetch_ms_p99": "ms to fetch a range, 99th percentile",
    "data/fetch_mib_per_second": "MiB fetched per second",
    "data/retries": "reads and fetches tried again",
}
_BY_KIND = {
    "data/masked/": "samples that could not be read",
    "data/mended/": "texts mended",
    "train/skipped/": "steps skipped",
}
_STEADY = ("eval/", "train/lr", "model/logit_scale", "perf/memory_gib")
"""Beside counts: what is shown as it is."""
_FROM_ZERO = ("perf/", "data/")


def panels(runs: Sequence[RunData]) -> dict[str, list[dict[str, Any]]]:
    """The panels of each section as JSON: `{name, title, zero, runs: [null or {line, raw}]}`.

    `line` and `raw` are `[samples, values]`; `raw` is left out where there is nothing to smooth.
    """
    names = dict.fromkeys(name for run in runs for name in run.series if name not in _NOT_DRAWN)
    if sum(name.startswith(_LOSS) for name in names) == 1:
        names.pop("train/loss", None)  # the sum of one
    found: dict[str, list[dict[str, Any]]] = {}
    # Losses before what else is known of an objective.
    for name in sorted(names, key=lambda name: not name.startswith("train/loss")):
        series = [run.series.get(name) for run in runs]
        if any(each is not None and _moves(each) for each in series):
            panel = {
                "name": name,
                "title": title(name),
                "zero": name.startswith(_FROM_ZERO),
                "runs": [each and _lines(name, each) for each in series],
            }
            found.setdefault(_section(name), []).append(panel)
    return {section: found[section] for section in SECTIONS if section in found}


def title(name: str) -> str:
    """A metric in words."""
    if name in _TITLES:
        return _TITLES[name]
    if name.startswith(_LOSS):
        return f"{name.removeprefix(_LOSS)} loss"
    kind, _, rest = name.partition("/")
    for counted, words in _BY_KIND.items():
        if name.startswith(counted):
            return f"{words}, {name.removeprefix(counted).replace('_', ' ')}"
    return (rest or kind).replace("zero_shot", "zero-shot").replace("/", " ").replace("_", " ")


def thin(values: np.ndarray) -> np.ndarray:
    """(m,) ascending places that draw the same picture: both ends, and the extremes of each bucket."""
    if len(values) <= 2 * _BUCKETS:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), _BUCKETS, dtype=int)
    extremes = [
        first + place
        for first, last in pairwise(edges)
        for place in (values[first:last].argmin(), values[first:last].argmax())
    ]
    return np.unique([0, *extremes, len(values) - 1])


def _section(name: str) -> str:
    return _MOVED.get(name) or _SECTIONS.get(name.partition("/")[0], _OTHER)


def _moves(series: Series) -> bool:
    """A flat line has nothing to show; tables say what it is."""
    return bool(np.ptp(series.values) > 0)


def _noisy(name: str, series: Series) -> bool:
    counts = bool((np.diff(series.values) >= 0).all())
    return len(series.values) >= _SMOOTHED_FROM and not name.startswith(_STEADY) and not counts


def _lines(name: str, series: Series) -> dict[str, Any]:
    kept = thin(series.values)
    raw = _points(series.samples[kept], series.values[kept])
    if not _noisy(name, series):
        return {"line": raw}
    few = np.unique(np.linspace(0, len(series.values) - 1, _BUCKETS, dtype=int))
    return {"line": _points(series.samples[few], smooth(series.values)[few]), "raw": raw}


def _points(samples: np.ndarray, values: np.ndarray) -> list[list[float]]:
    return [samples.astype(int).tolist(), [float(f"{value:.5g}") for value in values]]
