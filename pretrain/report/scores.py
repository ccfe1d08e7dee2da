"""What runs were judged to be, while they trained and on other data, as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from xml.etree.ElementTree import Element

from pretrain.report.collect import Evaluation, RunData, Series
from pretrain.report.curves import title
from pretrain.report.markup import Child, heads, node, table
from pretrain.report.words import count, score

_EVAL = "eval/"
_LOWER_IS_BETTER = {"perplexity"}
Values = Mapping[str, Sequence[float | None]]
"""Name to a value per run."""


def newest(runs: Sequence[RunData]) -> Element | None:
    """What each run was judged to be by now, the best it ever was where that is more, and chance."""
    names = dict.fromkeys(name for run in runs for name in run.series if name.startswith(_EVAL))
    if not names:
        return None
    values = {name.removeprefix(_EVAL): [run.last(name) for run in runs] for name in names}
    best = {name.removeprefix(_EVAL): [_best(name, run.series.get(name)) for run in runs] for name in names}
    chances = {name: _chance(runs, name) for name in values}
    ends = [
        max((s.samples[-1] for name in names if (s := run.series.get(name))), default=None) for run in runs
    ]
    labels = _labels(runs, [None if end is None else f"{count(end)} samples" for end in ends])
    return node("div", _table(labels, values, chances, best))


def elsewhere(runs: Sequence[RunData]) -> list[Element]:
    """A heading with a table for every name under RUN_DIR/evaluations that says something new."""
    found: dict[str, list[Evaluation | None]] = {}
    for place, run in enumerate(runs):
        for each in run.evaluations:
            if not _is_newest(run, each):
                found.setdefault(each.name, [None] * len(runs))[place] = each
    elements: list[Element] = []
    for name, columns in found.items():
        known = [each for each in columns if each is not None]
        data = ", ".join(dict.fromkeys(each.data for each in known))
        labels = _labels(runs, [f"step {count(each.step)}" if each else None for each in columns])
        metrics = dict.fromkeys(metric for each in known for metric in each.scores)
        scores = {
            metric: [each.scores.get(metric) if each else None for each in columns] for metric in metrics
        }
        values = {metric: [each and each.value for each in row] for metric, row in scores.items()}
        chances = {
            metric: next((each.chance for each in row if each and each.chance is not None), None)
            for metric, row in scores.items()
        }
        heading = node("h3", f"{name} ", node("span", data, class_="quiet"))
        elements.append(node("div", heading, _table(labels, values, chances, {})))
    return elements


def _is_newest(run: RunData, evaluation: Evaluation) -> bool:
    """Whether its scores are those that stand in the table of `newest` already."""
    return all(run.last(_EVAL + name) == each.value for name, each in evaluation.scores.items())


def _labels(runs: Sequence[RunData], below: Sequence[str | None]) -> list[Child]:
    """The runs at the head of their columns, each with where it stood."""
    names = heads([run.name for run in runs])
    return [
        node("span", name, node("br") if len(runs) > 1 else None, words)
        for name, words in zip(names, below, strict=True)
    ]


def _table(
    labels: Sequence[Child],
    values: Values,
    chances: Mapping[str, float | None],
    below: Mapping[str, Sequence[Child]],
) -> Element:
    """A row per metric, a column per run; one for chance where it is known of any."""
    known = any(chance is not None for chance in chances.values())
    rows: list[list[Child]] = []
    for name, row in values.items():
        there = [value for value in row if value is not None]
        best = _better(name)(there) if len(set(there)) > 1 else None
        cells: list[Child] = [
            None
            if value is None
            else node("span", node("span", score(value), class_="best" if value == best else "score"), under)
            for value, under in zip(row, below.get(name, [None] * len(row)), strict=True)
        ]
        chance = chances[name]
        last = [node("span", score(chance), class_="quiet") if chance is not None else None]
        rows.append([title(_EVAL + name), *cells, *(last if known else [])])
    return table([None, *labels, *(["chance"] if known else [])], rows)


def _better(name: str) -> Callable[[Sequence[float]], float]:
    return min if name in _LOWER_IS_BETTER else max


def _best(name: str, series: Series | None) -> Child:
    """The best value and where it was, if it is not the newest."""
    if series is None:
        return None
    best = _better(name.removeprefix(_EVAL))(series.values.tolist())
    if best == series.values[-1]:
        return None
    at = float(series.samples[series.values == best][0])
    return node("small", node("br"), f"best {score(best)} at {count(at)} samples")


def _chance(runs: Sequence[RunData], name: str) -> float | None:
    """What guessing would get on a run's own evaluation data, where that was evaluated alone as well."""
    for run in runs:
        own = run.config.get("val") or run.config.get("data")
        for each in run.evaluations:
            if each.data == own and name in each.scores and each.scores[name].chance is not None:
                return each.scores[name].chance
    return None
