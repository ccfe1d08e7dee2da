"""The runs that a submission starts: one, or those of a sweep. Each is checked as it would start."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from datasets.errors import UserError
from pretrain import runfile
from pretrain.cli import Command, parse
from pretrain.elastic import check_ranks
from pretrain.rundir import RunDir
from slurm.request import Request

_UNFIT = re.compile(r"[^\w.=+-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run."""

    settings: tuple[str, ...]
    """What a sweep sets, as KEY=VALUE; empty for a single run."""
    arguments: tuple[str, ...]
    """Those of `pretrain.launch`, without its run directory."""
    command: Command
    """What they mean; its run directory is absolute."""

    @property
    def out(self) -> Path:
        """The run directory."""
        return self.command.out

    def files(self, root: Path) -> list[tuple[str, Path]]:
        """The recipe, where it is a file: its path in a copy of the repository `root`, and its own."""
        given, _, _ = self._recipe().partition(":")
        if not given.endswith((".py", ".yaml", ".yml")):
            return []
        path = Path(given).resolve()
        name = path.relative_to(root) if path.is_relative_to(root) else Path("given", *path.parts[1:])
        return [(str(name), path)]

    def _recipe(self) -> str:
        """What the last --recipe names."""
        given = ""
        for flag, following in zip(self.arguments, [*self.arguments[1:], ""], strict=True):
            name, joined, value = flag.partition("=")
            if name == "--recipe":
                given = value if joined else following
        return given


def trials(arguments: Sequence[str], sweep: Sequence[str]) -> list[Trial]:
    """The runs of a command line and of a sweep.

    Args:
        arguments: those of `pretrain.launch`.
        sweep: KEY=VALUE,VALUE,... for each flag that varies.

    Raises:
        UserError: a flag, value or sweep that no run can have.
    """
    # A path ends up in the job as it was meant here, where whoever submits stands.
    base = parse(arguments)
    for flag, given in {"--explain": base.explain, "--plan": base.plan is not None}.items():
        if given:
            raise UserError(
                f"{flag} prints what a run would do: call it here, python -m pretrain.launch {flag}"
            )
    top = base.out.absolute()
    if not sweep:
        return [Trial(settings=(), arguments=tuple(arguments), command=replace(base, out=top))]
    chosen = [_values(each) for each in sweep]
    keys = [key for key, _ in chosen]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--sweep names {key} twice: give all its values at once, {key}=A,B,C")
        if key in ("out", "stage"):
            raise UserError(f"--sweep {key}: every run of a sweep has its own directory and the same stages")
    found: list[Trial] = []
    for values in product(*(values for _, values in chosen)):
        settings = tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True))
        flags = [part for key, value in zip(keys, values, strict=True) for part in (f"--{key}", value)]
        given = (*arguments, *flags)
        names = (f"{_short(key, keys)}={value}" for key, value in zip(keys, values, strict=True))
        out = top / _UNFIT.sub("-", "_".join(names)).strip("-")
        found.append(Trial(settings=settings, arguments=given, command=replace(parse(given), out=out)))
    _check_apart(found)
    return found


def of_stage(trial: Trial, stage: str) -> Trial:
    """The same run, for another stage of it.

    Raises:
        UserError: it has no such stage.
    """
    if stage not in trial.command.run.stages:
        known = ", ".join(trial.command.run.stages)
        raise UserError(f"--then {stage}: this run has no stage of that name; it has {known}")
    names, before = list(trial.command.run.stages), trial.command.stage
    if before is not None and names.index(stage) <= names.index(before):
        raise UserError(
            f"--then {stage}: it does not follow stage {before}; their order is {', '.join(names)}"
        )
    command = replace(trial.command, stage=stage)
    return replace(trial, arguments=(*trial.arguments, "--stage", stage), command=command)


def frozen(trial: Trial, root: Path, copy: Path) -> Trial:
    """The same run, with a recipe that is a file read from the copy of the repository."""
    for name, _ in trial.files(root):
        variant = trial._recipe().partition(":")[1:]
        return replace(trial, arguments=(*trial.arguments, "--recipe", f"{copy / name}{''.join(variant)}"))
    return trial


def check(trial: Trial, request: Request) -> None:
    """Refuse what would fail hours later, when its turn has come.

    Raises:
        UserError: names the flag or the directory.
    """
    run, out = trial.command.run, trial.out
    if run.deterministic == "elastic":
        check_ranks(run.shuffle.lanes, request.ranks)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the run directory {out} cannot be made ({error.strerror}): choose another --out"
        ) from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"the run directory {out} cannot be written: choose another --out")
    there = RunDir(out).run_yaml
    changed = there.exists() and runfile.identity(runfile.load(there)) != runfile.identity(run)
    if changed and not trial.command.allow_changed:
        raise UserError(
            f"{out} belongs to another run: choose another --out, or go on in it with --allow-changed"
        )


def _values(sweep: str) -> tuple[str, list[str]]:
    key, given, text = sweep.partition("=")
    values = [value.strip() for value in text.split(",")]
    if not given or not key or not all(values):
        raise UserError(f"--sweep {sweep} is not KEY=VALUE,VALUE, such as seed=0,1,2")
    return key.strip().removeprefix("--"), values


def _short(key: str, keys: Sequence[str]) -> str:
    """The end of a dotted key, as much of it as tells it from the others."""
    parts = key.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)


def _check_apart(found: Sequence[Trial]) -> None:
    runs: dict[str, Trial] = {}
    for trial in found:
        same = runs.setdefault(runfile.dump(trial.command.run), trial)
        if same is not trial or any(other is not trial and other.out == trial.out for other in found):
            first = " ".join((same if same is not trial else found[0]).settings)
            raise UserError(
                f"--sweep makes the same run twice ({first} and {' '.join(trial.settings)}): leave one out"
            )
