"""argv -> Run. What decides the shape of a run is read first; every leaf of it is then a flag.

`--recipe` and `--objectives` and `--model` build the value, tyro makes its leaves flags: `--help` shows the
flags of exactly this run, and an unknown flag is an error with a suggestion.
"""

from __future__ import annotations

import argparse
import re
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

import tyro

from datasets.errors import UserError
from datasets.sources import SourceConfig
from objectives import kind_of, objective_class
from objectives.base import Objective
from pretrain import runfile
from pretrain.config import Run
from pretrain.curriculum import Curriculum
from pretrain.plan.wanted import HELP as PLAN
from pretrain.plan.wanted import Wanted, stand_in, take
from pretrain.stage import Stage
from pretrain.zoo.models import model_config, own_resolution

_DESCRIPTION = f"""Pretrain with any mix of objectives.

These decide what else there is to set; all other flags are listed below, for this choice:

  --recipe NAME            a module of pretrain/recipes, NAME:small for its small version, or a path:
                           mine.py, RUN_DIR/run.yaml (default: laptop)
  --objectives itc,lm      what to minimise: KIND, KIND:WEIGHT or NAME=KIND, separated by commas
  --model KIND[:NAME]      dual, or open_clip:ViT-B-32 for a whole open_clip model, also open_clip:PATH
  --data [NAME=]WHERE      scenes (built in) or tar shards: a manifest, globs, brace ranges, with commas
                           between; again with another NAME for a mixture, set by --sources.NAME.*;
                           of one NAME the last counts; a path with = needs a NAME= or ./ before it
  --stage NAME             train this stage and stop; it goes on from the one before in the same --out
                           (default: all that are not finished, one after the other)
  --out RUN_DIR            where the run lives; the same command again goes on there
  --explain                print what this run would do and cost, draw its stages beside RUN_DIR, do no more
{PLAN}
  --allow-changed          go on in RUN_DIR although data, seed, batch or order are others; it is recorded
"""
_SHAPE = ("--recipe", "--objectives", "--model", "--data", "--stage", "--out", "--explain", "--allow-changed")
_NAMED = re.compile(r"([A-Za-z_]\w*)=(.+)", re.DOTALL)
_RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What a command line asks for."""

    run: Run
    out: Path
    stage: str | None = None
    """The only stage to train; None for all that are not finished."""
    explain: bool = False
    """Whether it is only to be told what would be done."""
    plan: Wanted | None = None
    """What it is to be planned for, if it is."""
    allow_changed: bool = False
    """Whether the run may go on where data, seed, batch or order are others than before."""


def parse(arguments: Sequence[str]) -> Command:
    """Read a command line (without the program's name).

    Raises:
        UserError: an unknown recipe, objective or model, or a value that no run can have.
        SystemExit: --help, and flags that tyro refuses (exit code 2).
    """
    shape = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in _SHAPE:
        listed = {"--data": "append", "--explain": "store_true", "--allow-changed": "store_true"}
        shape.add_argument(flag, action=listed.get(flag, "store"))
    planned, others = take(arguments)
    chosen, leaves = shape.parse_known_args(others)
    for flag in (leaf.partition("=")[0] for leaf in leaves if leaf.startswith("--")):
        near = get_close_matches(flag, _SHAPE, n=1, cutoff=0.8)
        if near and "." not in flag:
            raise UserError(f"unknown flag {flag}; did you mean {near[0]}?")

    name = chosen.recipe or "laptop"
    run = load_recipe(name)
    if chosen.model is not None:
        run = replace(run, model=model_config(chosen.model))
        run = replace(run, stages=at_own_resolution(run))
    if chosen.objectives is not None:
        run = replace(run, objectives=parse_objectives(chosen.objectives, run.objectives))
    if chosen.data:
        run = replace(run, sources=parse_data(chosen.data, run.sources))
    run = tyro.cli(Run, default=run, args=leaves, prog="python -m pretrain.launch", description=_DESCRIPTION)
    if planned is not None:
        run = stand_in(run)
    run.check()
    title = re.sub(r"\W+", "-", Path(name).stem) if chosen.recipe else "-".join(run.objectives)
    out = Path(chosen.out) if chosen.out else Path("runs") / f"{title}-{runfile.identity(run)[:8]}"
    if chosen.stage is not None:
        Curriculum(run.stages).of_stage(chosen.stage)  # refuses one that is not there
    return Command(
        run=run,
        out=out,
        stage=chosen.stage,
        explain=chosen.explain,
        plan=planned,
        allow_changed=chosen.allow_changed,
    )


def at_own_resolution(run: Run) -> dict[str, Stage]:
    """The stages at the resolution that the model was made for, if it has one; what changes stays."""
    own = own_resolution(run.model)
    if own is None:
        return run.stages
    return {
        name: replace(stage, resolution=own) if isinstance(stage.resolution, int) else stage
        for name, stage in run.stages.items()
    }


def load_recipe(name: str) -> Run:
    """The run of `NAME`, `NAME:small`, `path/to/mine.py[:small]` or `path/to/run.yaml`.

    Raises:
        UserError: there is no such recipe; names the nearest one.
    """
    base, _, variant = name.partition(":")
    function = variant or "recipe"
    if base.endswith((".yaml", ".yml")):
        return runfile.load(Path(base))
    if base.endswith(".py"):
        if not Path(base).is_file():
            raise UserError(f"there is no recipe file {base}")
        found = runpy.run_path(base)
    else:
        known = sorted(path.stem for path in _RECIPES.glob("[a-z]*.py"))
        if base not in known:
            near = get_close_matches(base, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"unknown recipe {base!r}; {hint}Known: {', '.join(known)}")
        found = vars(import_module(f"pretrain.recipes.{base}"))
    run = found[function]() if callable(found.get(function)) and function.islower() else None
    if not isinstance(run, Run):
        there = " and ".join(f"{name}()" for name in ("recipe", "small") if callable(found.get(name)))
        raise UserError(f"recipe {base} has no {function}() that returns a Run; it has {there or 'neither'}")
    return run


def parse_data(given: Sequence[str], known: Mapping[str, SourceConfig]) -> dict[str, SourceConfig]:
    """`WHERE` and `NAME=WHERE` as sources by name, with the settings that the recipe has for the name.

    One without name takes that of the recipe's only source. Of one name the last counts.
    """
    only = next(iter(known)) if len(known) == 1 else "data"
    chosen: dict[str, SourceConfig] = {}
    for each in given:
        match = _NAMED.fullmatch(each)
        name, data = (match[1], match[2]) if match else (only, each)
        chosen[name] = replace(known.get(name, SourceConfig()), data=data)
    return chosen


def parse_objectives(text: str, known: dict[str, Objective.Config]) -> dict[str, Objective.Config]:
    """`itc,lm:2,mlm_text=mlm` as configurations by name; those of the recipe are kept where they match.

    Raises:
        UserError: an unknown kind, a weight that is no number, a name that stands twice.
    """
    chosen: dict[str, Objective.Config] = {}
    for part in text.split(","):
        entry, _, weight = part.strip().partition(":")
        name, _, kind = entry.rpartition("=")
        name = name or kind
        if not name.isidentifier():
            raise UserError(f"--objectives {text}: {part.strip()!r} is not KIND, KIND:WEIGHT or NAME=KIND")
        config_class = objective_class(kind).Config
        if name in chosen:
            raise UserError(f"--objectives names {name!r} twice; write NAME={kind} for a second instance")
        before = known.get(name)
        config = before if before is not None and kind_of(before) == kind else config_class()
        if weight:
            config = replace(config, weight=_number(weight, part))
        chosen[name] = config
    return chosen


def _number(text: str, part: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--objectives: the weight in {part!r} is not a number") from None
