"""The dashboard of a run's W&B project, as code: `python -m pretrain.dashboard RUN_DIR`.

It can be made at once, because what is on it follows from what the run is. Only what the model is judged by
depends on the data as well: whether that has class labels, captions and enough classes; and what reading
costs: whether a manifest names shards behind a network. So before the first evaluation and the first report
there is a panel for whatever the flags allow, and some may stay empty; made again after it, there is one for
what was measured.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets.commands import run
from datasets.errors import UserError
from objectives import kind_of, objective_class
from objectives.base import Widths
from pretrain import runfile
from pretrain.config import Run
from pretrain.evaluate.judge import Matcher
from pretrain.mirror.account import login, one_line, project_of
from pretrain.mirror.reach import answers
from pretrain.mirror.rows import Rows
from pretrain.rundir import RunDir
from pretrain.sinks.mirrored import Wandb, settings_of
from pretrain.stopwatch import PARTS

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

DONE, USER_ERROR = 0, 2
_WIDTHS = Widths(embed=1, image_tokens=1, text_tokens=1, vocabulary=1, temperature=True, contrast=False)
"""Of a model that is as good as any: what is asked of the objectives does not depend on it."""
_RECALL = tuple(f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))
_RERANKED = (*(f"{name}_reranked" for name in _RECALL), "itm_accuracy")
_SCENES = ("zero_shot_seen_combinations", "zero_shot_unseen_combinations")
_EXACT = ("exact_captions_1_object", "exact_captions_2_objects", "exact_captions_1_unseen_object")
_ZERO_SHOT = ("zero_shot_top1", "zero_shot_top5")
_CAPTIONS = ("cider_d", "bleu_1", "bleu_4", "rouge_l", "perplexity")
_LOCAL = ("data/read_ms_p50", "data/read_ms_p99")
_REMOTE = ("data/fetch_ms_p50", "data/fetch_ms_p99")
_PARTS = tuple(f"perf/part/{part}" for part in ("data", *PARTS))
_CLOCKS = ("perf/step_seconds_p50", "perf/step_seconds_p99")


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Curves over samples seen."""

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str = ""
    """A regular expression in place of names, for metrics of which a run may report any or none."""


_BY_KIND = (
    Panel(title="masked, by kind", pattern="data/masked/.*"),
    Panel(title="texts mended, by kind", pattern="data/mended/.*"),
)
_SKIPPED = Panel(title="steps skipped, by kind", pattern="train/skipped/.*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Panels under one heading."""

    name: str
    panels: tuple[Panel, ...]
    pictures: bool = False
    """Whether the sample sheets are shown too."""


def sections(
    *,
    objectives: Sequence[str],
    matching: Sequence[str] = (),
    towers: Collection[str],
    evaluations: Collection[str],
    shards: bool = False,
    remote: bool = False,
) -> tuple[Section, ...]:
    """What the dashboard of a run shows; headings without a panel are left out.

    Args:
        objectives: their names.
        matching: of those that tell matching pairs from others.
        towers: parts of the model that have a gradient: image, text, captioner, fusion, objectives.
        evaluations: names of what it is judged by, without `eval/`.
        shards: whether files are read rather than the built-in scenes.
        remote: whether they are fetched through a network.
    """
    losses = [f"train/loss/{name}" for name in objectives]
    quality = [name for name in (*_ZERO_SHOT, *_SCENES, *_RECALL, *_RERANKED) if name in evaluations]
    captions = [name for name in (*_CAPTIONS, *_EXACT) if name in evaluations]
    told = [f"train/{name}/accuracy" for name in objectives]
    told += [f"train/{name}/{what}" for name in matching for what in ("trivial", "missing")]
    norms = [f"model/gradient_norm/{tower}" for tower in towers]
    everything = (
        Section(name="Losses", panels=_panels("train/loss", *losses)),
        Section(name="Recall and zero-shot", panels=_panels(*(f"eval/{name}" for name in quality))),
        Section(
            name="Captions", panels=_panels(*(f"eval/{name}" for name in captions)), pictures=bool(captions)
        ),
        Section(name="In training", panels=_panels(*told)),
        Section(name="Gradient norms", panels=_panels("model/gradient_norm", *norms)),
        Section(name="Temperature and learning rate", panels=_panels("model/logit_scale", "train/lr")),
        Section(
            name="Throughput and data wait",
            panels=(
                *_panels("perf/samples_per_second", "perf/data_wait"),
                Panel(title="seconds of a step, median and 99th percentile", metrics=_CLOCKS),
                Panel(title="shares of a step's time", metrics=_PARTS),
                *_panels("perf/mfu", "perf/tflops", "perf/memory_gib"),
                Panel(title="slowest rank, and by what factor", pattern="perf/slowest_rank.*"),
            ),
        ),
        Section(name="Reading", panels=_reading(shards=shards, remote=remote)),
        Section(
            name="Bad data",
            panels=(*_panels("data/masked", "train/skipped"), _SKIPPED, *(_BY_KIND if shards else ())),
        ),
        Section(name="Restarts", panels=_panels("perf/restarts", "perf/lost_steps")),
    )
    return tuple(section for section in everything if section.panels)


def of_run(run: Run, *, measured: Collection[str] = ()) -> tuple[Section, ...]:
    """What the dashboard of a run shows.

    Args:
        run: resolved.
        measured: the metrics of its evaluations and of reading that it has reported; before the first of
            either, all that the flags allow is shown, of which the data may lack some.
    """
    made = {name: objective_class(kind_of(each))(each, _WIDTHS) for name, each in run.objectives.items()}
    read = {"image", *(wanted.run[0] for each in made.values() for wanted in each.passes)}
    trained = read | ({"text"} if "fusion" in read else set())
    towers = [tower for tower in ("image", "text", "captioner", "fusion") if tower in trained]
    if any(each.temperature is not None or any(True for _ in each.parameters()) for each in made.values()):
        towers.append("objectives")
    judged = {name.removeprefix("eval/") for name in measured if name.startswith("eval/")}
    reported = any(name.startswith("data/") for name in measured)
    specs = [source.data for source in run.sources.values() if source.data != "scenes"]
    fetched = "data/cache_hits" in measured if reported else any(map(_may_be_remote, specs))
    return sections(
        objectives=tuple(run.objectives),
        matching=tuple(name for name, each in made.items() if isinstance(each, Matcher)),
        towers=towers,
        evaluations=judged or _allowed(run, read),
        shards=bool(specs),
        remote=fetched,
    )


def _may_be_remote(spec: str) -> bool:
    return "://" in spec or any(name.strip().endswith(".json") for name in spec.split(","))


def _reading(*, shards: bool, remote: bool) -> tuple[Panel, ...]:
    """What is known of reading ahead, of shards and of the network."""
    panels = [Panel(title="steps that lie ready", metrics=("data/queue",))]
    if shards:
        panels += [
            Panel(title="ms to read a part of a sample, median and 99th percentile", metrics=_LOCAL),
            Panel(title="ms to decode an image, median", metrics=("data/decode_ms_p50",)),
            Panel(title="reads and fetches tried again", metrics=("data/retries",)),
        ]
    if remote:
        panels += [
            Panel(title="share of reads found in the cache", metrics=("data/cache_hits",)),
            Panel(title="MiB per second fetched", metrics=("data/fetch_mib_per_second",)),
            Panel(title="ms to fetch a range, median and 99th percentile", metrics=_REMOTE),
        ]
    return tuple(panels)


def _allowed(run: Run, read: Collection[str]) -> Collection[str]:
    """What the model may be judged by, as far as the flags say; `read` names what its objectives read."""
    scenes, given = (run.val or run.data) == "scenes", bool(run.val)
    embeds = (*_RECALL, *(_SCENES if scenes else _ZERO_SHOT)) if "text" in read else ()
    writes = (_EXACT if scenes else _CAPTIONS) if "captioner" in read else ()
    again = _RERANKED if {"text", "fusion"} <= set(read) and run.eval.rerank else ()
    return (*embeds, *again, *writes) if scenes or given else ()


def measured(rundir: RunDir) -> set[str]:
    """The metrics that depend on the data, of those that a run has reported so far."""
    names = {name for row in Rows(rundir.metrics).new(ended=True) for name in row}
    return {name for name in names if name.startswith(("eval/", "data/"))}


def panel_metrics(shown: Sequence[Section]) -> set[str]:
    """Every metric that a panel names; `python -m pretrain.launch` has to report each."""
    return {metric for section in shown for panel in section.panels for metric in panel.metrics}


def workspace(shown: Sequence[Section], *, entity: str, project: str) -> Workspace:
    """The same as W&B's client says it."""
    from wandb_workspaces import workspaces as ws
    from wandb_workspaces.reports import v2 as wr

    def panels(section: Section) -> list[Any]:
        plots = [
            wr.LinePlot(
                title=each.title, x="samples", y=list(each.metrics), metric_regex=each.pattern or None
            )
            for each in section.panels
        ]
        sheet = wr.MediaBrowser(title="sample sheets", media_keys=["eval/sheet"], gallery_axis="step")
        table = wr.WeavePanelSummaryTable(table_name="eval/samples")
        return [*plots, sheet, table] if section.pictures else plots

    return ws.Workspace(
        entity=entity,
        project=project,
        name="Medley",
        sections=[ws.Section(name=each.name, panels=panels(each), is_open=True) for each in shown],
        settings=ws.WorkspaceSettings(x_axis="samples"),
    )


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.dashboard", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="directory of a run of the project")
    parser.add_argument(
        "--dry-run", type=Path, metavar="FILE", help="write it there as JSON, and save nothing"
    )
    options = parser.parse_args(arguments)
    try:
        sys.stdout.write(f"{build(RunDir(options.run_dir), dry_run=options.dry_run)}\n")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    return DONE


def build(rundir: RunDir, *, dry_run: Path | None) -> str:
    """Save the dashboard of a run's project, or write it as JSON; returns where it is.

    Raises:
        UserError: no run, no client, no key or a malformed one, no server, or no place for the file.
    """
    settings = settings_of(rundir)
    shown = of_run(runfile.load(rundir.run_yaml), measured=measured(rundir))
    if find_spec("wandb_workspaces") is None:
        raise UserError("dashboards need the package wandb-workspaces: pip install -e '.[dashboards]'")
    # The library reads these when it is imported. A run may be kept offline; its dashboard cannot.
    os.environ["WANDB_MODE"] = "online"
    os.environ.setdefault("WANDB_SILENT", "true")
    if dry_run is None:
        return _save(shown, settings)
    spec = workspace(shown, entity=settings.entity, project=project_of(settings))
    try:
        dry_run.write_text(spec._to_model().model_dump_json(by_alias=True, indent=1))
    except OSError as error:
        raise UserError(f"{dry_run} cannot be written: {error.strerror}") from error
    return str(dry_run)


def _save(shown: Sequence[Section], settings: Wandb) -> str:
    import wandb

    server = login()
    if server is None:
        raise UserError("W&B keeps its dashboards and needs an API key: wandb login, or --dry-run FILE")
    if not answers(server):
        raise UserError(
            f"W&B keeps its dashboards, and {server} does not answer: --dry-run FILE needs neither"
        )
    try:
        entity = settings.entity or wandb.setup().settings.entity or wandb.Api().default_entity or ""
        return workspace(shown, entity=entity, project=project_of(settings)).save().url
    except Exception as error:  # the client's layers share no class of errors
        raise UserError(f"{server} does not take the dashboard: {one_line(error)}") from error


def _panels(*metrics: str) -> tuple[Panel, ...]:
    """One for each."""
    return tuple(
        Panel(title=metric.partition("/")[2].replace("_", " "), metrics=(metric,)) for metric in metrics
    )


if __name__ == "__main__":
    run(main)
