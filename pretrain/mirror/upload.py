"""The W&B run of a run directory: online where that can be, else offline, and each step in it once.

A run directory has one run id. Online, steps that the server has are not sent again, an evaluation of such a
step that was made later is sent by itself, and steps that training has abandoned since are rewound. Offline
there is nobody to ask, and W&B cannot go on with an offline run: it is made anew from the records, and the
earlier ones are set aside.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from datasets.atomic import replace
from datasets.errors import UserError
from pretrain.mirror.account import login, one_line, project_of, without_server
from pretrain.mirror.reach import answers
from pretrain.mirror.rows import Row
from pretrain.rundir import RunDir
from pretrain.sinks.mirrored import Wandb

if TYPE_CHECKING:
    from wandb import Run as WandbRun

_WHEN = ("step", "samples", "time")
_INIT_SECONDS = 30.0
_FINISH_SECONDS = 600.0
"""How long a server that went away is waited for when training has ended; the next start sends the rest."""


class Upload:
    """A W&B run that rows are sent to; `begin` gives one."""

    def __init__(self, run: WandbRun, rundir: RunDir, *, has: int = -1, judged: int = -1) -> None:
        """Take over a run.

        Args:
            run: of W&B, online or offline.
            rundir: where the samples lie.
            has: the last step that it has already; -1 for none.
            judged: the last step whose evaluation it has already.
        """
        self._run = run
        self._samples = rundir.samples
        self._has = has
        self._judged = judged
        self._free = run.starting_step
        self._best: dict[str, dict[str, float]] = {}
        self._finished = False
        run.define_metric("samples", hidden=True)
        run.define_metric("*", step_metric="samples")
        for name in ("step", "finished", "eval/step"):
            run.define_metric(name, step_metric="samples", hidden=True)

    @property
    def server(self) -> str | None:
        """The address that rows are sent to; None offline."""
        return None if self._run.offline else self._run.settings.base_url

    def send(self, row: Row) -> None:
        """Send what the run lacks of a step; steps ascend."""
        step, judged = row["step"], any(map(_is_judgement, row))
        self._finished |= "finished" in row
        self._remember(row)
        if step <= self._has:
            if not judged or step <= self._judged:
                return
            # An earlier start sent the report of this step and ended before its evaluation.
            row = {name: row[name] for name in row if _is_judgement(name) or name in _WHEN}
        when = {"_timestamp": row["time"]} if "time" in row else {}
        values = {name: value for name, value in row.items() if name != "time"}
        if judged:
            values["eval/step"] = step
        # Its own step, but for an evaluation that comes late: that takes the next one.
        place = max(step, self._free)
        self._run.log(values | when, step=place, commit=False)
        # Second, because a picture's file is named after the row that was begun.
        self._run.log((self._pictures(step) if judged else {}) | when, step=place, commit=True)
        self._run.summary.update({name: self._best[name] for name in row if name in self._best})
        self._free = place + 1

    def finish(self) -> None:
        """Send the rest and close the run.

        Raises:
            ConnectionError: the client's own process is gone, and what it held with it.
        """
        import wandb

        self._run.finish(exit_code=0 if self._finished else 1)
        wandb.teardown()

    def _remember(self, row: Row) -> None:
        """The best value of a run beside its last. W&B's own count of it would begin anew with each start."""
        for name, value in row.items():
            goal = _goal(name)
            if goal is None:
                continue
            before = self._best.get(name)
            if before is None:
                self._run.define_metric(name, step_metric="samples", summary="none")
            best = value if before is None else goal(before[goal.__name__], value)
            self._best[name] = {goal.__name__: best, "last": value}

    def _pictures(self, step: int) -> Row:
        """The sample sheet of a step and, as a table, what it shows; nothing if there is none."""
        import wandb

        path = self._samples / f"step-{step:08d}.json"
        try:
            sheet = json.loads(path.read_text())
            rows = [
                [wandb.Image(str(self._samples / row["image"])), row["said"], "\n".join(row["references"])]
                for row in sheet["rows"]
            ]
            picture = wandb.Image(
                str(self._samples / sheet["sheet"]), caption=f"said by the {sheet['said_by']}"
            )
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError):
            logging.exception("%s cannot be mirrored", path)
            return {}
        return {"eval/samples": wandb.Table(["image", "said", "references"], rows), "eval/sheet": picture}


def begin(
    rundir: RunDir, settings: Wandb, *, last: int, trainer: int | None, say: Callable[[str], None]
) -> Upload:
    """Open the W&B run of a run directory.

    Args:
        rundir: of the run.
        settings: where to; `disabled` is no case of it.
        last: the last step of the records: what the server has of later ones is abandoned.
        trainer: process whose use of the machine is watched; None if none is training.
        say: takes a sentence for the user.

    Raises:
        UserError: a project, entity or name that W&B does not allow, or a malformed key where an upload is
            demanded.
    """
    mode = settings.wanted()
    # The library reads these when it is imported, and before it looks for a key.
    os.environ["WANDB_MODE"] = "offline" if mode == "offline" else "online"
    os.environ.setdefault("WANDB_DATA_DIR", str(_staging(rundir).resolve()))
    os.environ.setdefault("WANDB_SILENT", "true")  # or a login asks the server for the user's name
    import wandb

    reason = "as asked" if mode == "offline" else _why_offline(demanded=mode == "online" and trainer is None)
    _set_aside(rundir)
    start = partial(_start, rundir, settings=settings, trainer=trainer)
    if reason is None:
        try:
            return _online(rundir, start, last=last, say=say)
        except wandb.Error as error:
            forget()
            reason = one_line(error)
    try:
        with without_server():
            run = start(id=_run_id(rundir), mode="offline")
    except wandb.Error as error:
        raise UserError(f"W&B does not take these settings: {one_line(error)}") from error
    say(
        f"W&B: offline ({reason}): {Path(run.dir).parent}; "
        f"`python -m pretrain.mirror {rundir.root} --mode online` uploads it"
    )
    return Upload(run, rundir)


def _start(rundir: RunDir, *, settings: Wandb, trainer: int | None, **how: Any) -> WandbRun:
    import wandb

    return wandb.init(
        dir=str(rundir.root),
        project=project_of(settings),
        entity=settings.entity or None,
        name=settings.name or os.environ.get("WANDB_NAME") or rundir.root.resolve().name,
        config=_config(rundir),
        settings={
            "console": "off",
            "save_code": False,
            "silent": True,
            "program": "pretrain/launch.py",
            "init_timeout": _INIT_SECONDS,
            "finish_timeout": 0.0 if trainer is None else _FINISH_SECONDS,
            # What is uploaded afterwards ran on another day, perhaps elsewhere, from other code.
            "disable_git": trainer is None,
            "x_disable_machine_info": trainer is None,
            "x_disable_stats": trainer is None,
            "x_stats_pid": trainer or os.getpid(),
        },
        **how,
    )


def _why_offline(*, demanded: bool) -> str | None:
    """Why there is no server to send to. A mistake costs training no copy; who demands an upload is told."""
    try:
        server = login()
    except UserError as error:
        if demanded:
            raise
        return str(error)
    if server is not None and answers(server):
        return None
    reason = "no API key" if server is None else f"{server} does not answer"
    if demanded:
        raise UserError(f"W&B cannot be online ({reason}): `wandb login` first, or leave out --mode online")
    return reason


def _online(
    rundir: RunDir, start: Callable[..., WandbRun], *, last: int, say: Callable[[str], None]
) -> Upload:
    import wandb

    run_id = _run_id(rundir)
    go_on = partial(start, id=run_id, resume="allow", mode="online")
    run = go_on()
    has = run.summary.get("step", run.starting_step - 1)
    judged = run.summary.get("eval/step", -1)
    if has > last:
        run.finish()
        try:
            run = start(resume_from=f"{run_id}?_step={last}", mode="online")
            has, judged = last, min(judged, last)
        except wandb.Error as error:
            forget()
            run = go_on()
            say(
                f"W&B: the server does not take back the steps after {last} ({one_line(error)}); "
                f"what it has up to step {has} stays as it was"
            )
    say(f"W&B: {run.url}")
    return Upload(run, rundir, has=has, judged=judged)


def forget() -> None:
    """End the client's own process, which would not begin the same run id a second time."""
    import wandb

    with suppress(ConnectionError):  # it has ended already
        wandb.teardown()


def _run_id(rundir: RunDir) -> str:
    """Made up once for a run directory."""
    path = rundir.wandb / "id"
    if not path.exists():
        replace(path, secrets.token_hex(8).encode())
    return path.read_text()


def _staging(rundir: RunDir) -> Path:
    """Copies that the library makes of what it uploads; its default is in the home directory."""
    return rundir.wandb / "staging"


def _set_aside(rundir: RunDir) -> None:
    """Move earlier offline runs where `wandb sync` does not find them: a server would have each step twice.

    They hold how the machine was used, which is nowhere else; copies of RUN_DIR/samples are dropped.
    """
    aside = rundir.wandb / "superseded"
    for folder in sorted(rundir.wandb.glob("offline-run-*")):
        aside.mkdir(exist_ok=True)
        shutil.rmtree(folder / "files" / "media", ignore_errors=True)
        folder.rename(aside / f"{len(list(aside.iterdir())):03d}-{folder.name}")
    shutil.rmtree(_staging(rundir), ignore_errors=True)


def _config(rundir: RunDir) -> dict[str, Any]:
    """The resolved run, and under `system` what it runs on."""
    system: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": version("torch"),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }
    with suppress(FileNotFoundError, IndexError, ValueError):
        start = json.loads(rundir.starts.read_text().splitlines()[-1])
        system |= {name: start[name] for name in ("ranks", "device") if name in start}
    return {**yaml.safe_load(rundir.run_yaml.read_text()), "system": system}


def _is_judgement(name: str) -> bool:
    return name.startswith("eval/") or name == "finished"


def _goal(name: str) -> Callable[[float, float], float] | None:
    """Which of two values is the better one."""
    if name.startswith("train/loss") or name == "eval/perplexity":
        return min
    return max if name.startswith("eval/") else None
