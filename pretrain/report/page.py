"""The report: what is said about runs, and in which order."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace as changed
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from datasets.errors import UserError
from pretrain.fencing import replace
from pretrain.report import scores
from pretrain.report.collect import Row, RunData, Sheet, collect
from pretrain.report.curves import SECTIONS, panels
from pretrain.report.health import facts, starts, vitals
from pretrain.report.markup import Child, document, fold, heads, look, node, picture, side_by_side, table
from pretrain.report.words import count, date
from pretrain.rundir import RunDir, leaves

_NO_CURVES = "There are no curves: nothing that changes was reported yet."


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained HTML file about one run or several.

    Args:
        runs: their directories; processes may be training there.
        out: the file, usually RUN_DIR/report.html. The old one stands until the new one is whole.

    Returns:
        `out`.

    Raises:
        UserError: one of the directories is not that of a run, or the file cannot be written.
    """
    try:
        page = _page(_named([collect(root) for root in runs]), footer=_command(runs, out))
    except OSError as error:
        raise UserError(f"a report needs {error.filename}, which cannot be read: {error.strerror}") from error
    try:
        if out.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        replace(out, page)
    except OSError as error:
        raise UserError(
            f"the report {out} cannot be written ({error.strerror}): choose another file with --out"
        ) from error
    return out


def _named(runs: list[RunData]) -> list[RunData]:
    """Runs whose directories have the same name go by their whole path."""
    names = [run.name for run in runs]
    return [changed(run, name=str(run.root)) if names.count(run.name) > 1 else run for run in runs]


def _command(runs: Sequence[Path], out: Path) -> str:
    """What writes this report again."""
    words = ["python", "-m", "pretrain.report", *map(str, runs)]
    return shlex.join(words if out == RunDir(runs[0]).report else [*words, "--out", str(out)])


def _page(runs: list[RunData], *, footer: str) -> bytes:
    drawn = panels(runs)
    sections: dict[str, list[Child]] = {}
    for title in SECTIONS:
        sections[title] = _figures(drawn, title)
        if title == "Evaluation":
            sections[title] = [*_evaluation(runs), *sections[title]]
            sections["Samples"] = [each for run in runs for each in _samples(run, alone=len(runs) == 1)]
    sections["Timing and data health"] = _health(runs)
    sections["Configuration"] = _configuration(runs)
    filled = {title: parts for title, parts in sections.items() if any(part is not None for part in parts)}

    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = [node("section", node("h2", each, id=_anchor(each)), *parts) for each, parts in filled.items()]
    return document(
        f"{title} - Medley",
        _header(runs, title),
        _bar(runs, list(filled)),
        node("main", None if drawn else node("p", _NO_CURVES), *body),
        node("footer", f"Written {date(time.time())} by ", node("code", footer)),
        data={
            "runs": [run.name for run in runs],
            "panels": [panel for section in drawn.values() for panel in section],
        },
    )


def _header(runs: Sequence[RunData], title: str) -> Element:
    header = node("header", node("h1", title))
    if len(runs) == 1:
        tiles = [node("div", node("dt", label), node("dd", value)) for label, value in facts(runs[0]).items()]
        header.extend([node("dl", *tiles, class_="tiles"), node("p", node("code", str(runs[0].root)))])
    else:
        columns = [{**facts(run), "Directory": node("code", str(run.root))} for run in runs]
        header.append(side_by_side([run.name for run in runs], columns))
    problems = [problem for run in runs for problem in run.problems]
    if problems:
        header.append(node("ul", *(node("li", each) for each in problems), class_="problems"))
    return header


def _bar(runs: Sequence[RunData], sections: Sequence[str]) -> Element:
    """Runs to switch on and off, and the way to each section."""
    buttons = [
        node(
            "button",
            node("i", class_="swatch"),
            run.name,
            class_=look(place),
            type="button",
            data_run=str(place),
            aria_pressed="true",
        )
        for place, run in enumerate(runs)
    ]
    links = [node("a", each, href=f"#{_anchor(each)}") for each in sections]
    log = node("button", "log scale", id="log", type="button", aria_pressed="false")
    axis = node("span", "curves over samples seen", class_="quiet")
    return node("nav", node("span", *(buttons if len(runs) > 1 else []), log, axis, class_="runs"), *links)


def _anchor(section: str) -> str:
    return section.lower().replace(" ", "-")


def _figures(drawn: Mapping[str, list[dict[str, Any]]], section: str) -> list[Child]:
    """Empty figures that page.js draws in; they count through all sections."""
    if section not in drawn:
        return []
    order = list(drawn)
    first = sum(len(drawn[each]) for each in order[: order.index(section)])
    figures = [
        node(
            "figure",
            node("figcaption", panel["title"], title=panel["name"]),
            data_panel=str(first + place),
        )
        for place, panel in enumerate(drawn[section])
    ]
    return [node("div", *figures, class_="panels")]


def _evaluation(runs: Sequence[RunData]) -> list[Child]:
    tables = [scores.newest(runs), *scores.elsewhere(runs)]
    return [node("div", *tables, class_="side")] if any(each is not None for each in tables) else []


def _samples(run: RunData, *, alone: bool) -> list[Child]:
    """The newest sheet, and what was said of its images then and before."""
    if not run.sheets:
        return []
    newest = run.sheets[-1]
    words = f"at step {count(newest.step)}, {count(newest.samples)} samples; captions by the {newest.said_by}"
    sheet = picture(newest.picture, alt=f"sample sheet of step {newest.step}")
    if sheet is not None:
        sheet.set("class", "sheet")
    parts: list[Child] = [sheet, _captions(run.sheets)]
    heading = node("h3", *([] if alone else [run.name, " "]), node("span", words, class_="quiet"))
    return [heading, *parts]


def _captions(sheets: Sequence[Sheet]) -> Element:
    """A row per image of the newest sheet: how it looks, what is right, and what was said at each sheet."""
    said = [{row.key: row.said for row in sheet.rows} for sheet in sheets]
    rows: list[list[Child]] = [
        [
            picture(row.image, alt=row.key) if row.image.is_file() else node("code", row.key),
            node("span", *(node("bdi", each) for each in row.references)),
            *(_said(each.get(row.key), row) for each in said),
        ]
        for row in sheets[-1].rows
    ]
    labels = [
        node("span", f"said at step {count(sheet.step)}", node("br"), f"{count(sheet.samples)} samples")
        for sheet in sheets
    ]
    return node("div", table(["image", "reference", *labels], rows), class_="captions")


def _said(caption: str | None, row: Row) -> Child:
    return node("bdi", caption, class_="right" if caption in row.references else "said")


def _health(runs: Sequence[RunData]) -> list[Child]:
    columns = [vitals(run) for run in runs]
    parts: list[Child] = [side_by_side([run.name for run in runs], columns) if any(columns) else None]
    for run in runs:
        listed = starts(run)
        if listed is not None:
            parts.append(fold(f"Starts of {run.name}", listed))
    return parts


def _configuration(runs: Sequence[RunData]) -> list[Child]:
    """What differs, if there is something to compare, and everything of each run."""
    if len(runs) == 1:
        return [node("div", _tree(runs[0].config), class_="config")]
    flat = [dict(leaves(run.config)) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows: list[list[Child]] = [
        [node("code", key), *(node("code", _value(each[key])) if key in each else None for each in flat)]
        for key in keys
        if any(each.get(key, ...) != flat[0].get(key, ...) for each in flat[1:])
    ]
    names = [run.name for run in runs]
    same = node("p", "These runs have the same configuration.")
    return [
        node("h3", "What differs"),
        table([None, *heads(names)], rows) if rows else same,
        *(fold(f"All of {run.name}", node("div", _tree(run.config), class_="config")) for run in runs),
    ]


def _tree(config: Mapping[str, Any]) -> Element:
    """A configuration as it is written, each mapping to be folded."""
    tree = node("dl", class_="tree")
    for key, value in config.items():
        if isinstance(value, dict) and value:
            branch = fold(str(key), _tree(value))
            branch.set("open", "")
            tree.append(node("dd", branch))
        else:
            tree.append(node("div", node("dt", str(key)), node("dd", node("code", _value(value)))))
    return tree


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str)
