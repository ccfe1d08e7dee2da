"""What is asked of the cluster: nodes, GPUs, time."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import tyro

from datasets.errors import UserError
from slurm.scheduler import absent

_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<after>\d+)(?::(?P<past>[0-5]?\d))?|(?P<hours>\d+):(?P<minutes>[0-5]\d))(?::[0-5]\d)?"
)
_CHANGED = ("nodes", "gpus", "tasks_per_node", "cpus_per_task", "time", "partition")
"""What a following stage may ask for otherwise."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Submit a run: `python -m slurm.submit --nodes 4 --gpus 8 --time 24:00 -- --recipe NAME ...`.

    What stands after `--` are the flags of pretrain.launch; they are checked before anything is submitted.
    """

    nodes: int = 1
    """Machines."""
    gpus: int | None = None
    """GPUs of each machine, one process for each; 0 for none."""
    tasks_per_node: int | None = None
    """Processes of each machine where there are no GPUs."""
    cpus_per_task: int | None = None
    """Cores of each process; by default 12 beside a GPU, else one."""
    time: str | None = None
    """Limit of one segment: HH:MM, HH:MM:SS or DAYS-HH; the job comes back after it until the run is done."""
    partition: str | None = None
    """Partition; by default the cluster's own."""
    account: str | None = None
    """Who pays."""
    sbatch: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Any other option of sbatch, as KEY=VALUE or KEY: --sbatch qos=high --sbatch exclusive."""
    executor: Literal["slurm", "local", "debug"] = "slurm"
    """Who runs it: the cluster, this machine in the background, or this process."""
    then: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A stage that follows in a job of its own: two, or two:nodes=16,time=12:00 where it needs others."""
    sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A flag of the run and its values: --sweep seed=0,1 --sweep stages.one.optim.lr=1e-4,3e-4 makes four
    runs, each in a directory of its own below --out, as one array."""
    at_once: int | None = None
    """Runs of a sweep that train at the same time; by default all."""

    @property
    def tasks(self) -> int:
        """Processes of each machine."""
        return self.gpus or self.tasks_per_node or 1

    @property
    def cores(self) -> int:
        """Of each process: what decodes and reads for a GPU needs several."""
        return self.cpus_per_task or (12 if self.gpus else 1)

    @property
    def ranks(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.tasks

    @property
    def minutes(self) -> int:
        """The time limit.

        Raises:
            UserError: it is no time.
        """
        match = _TIME.fullmatch(self.time or "")
        if match is None:
            raise UserError(f"--time {self.time} is no time: write HH:MM, HH:MM:SS or DAYS-HH, such as 24:00")
        days, hours = int(match["days"] or 0), int(match["after"] or match["hours"])
        total = (24 * days + hours) * 60 + int(match["past"] or match["minutes"] or 0)
        if total < 1:
            raise UserError(f"--time {self.time} is less than a minute; HH:MM are hours and minutes")
        return total

    def check(self) -> None:
        """Refuse what cannot be asked for.

        Raises:
            UserError: names the flag.
        """
        for name, least in (
            ("nodes", 1),
            ("gpus", 0),
            ("tasks_per_node", 1),
            ("cpus_per_task", 1),
            ("at_once", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        if self.executor == "debug":
            return
        if self.gpus is None:
            raise UserError(
                "how many GPUs has a node? --gpus 8, or --gpus 0 --tasks-per-node 4 for its processors"
            )
        if self.gpus and self.tasks_per_node:
            raise UserError(f"--gpus {self.gpus} starts one process for each: leave --tasks-per-node out")
        if self.executor == "slurm":
            self._check_cluster()
        elif self.nodes > 1:
            raise UserError(f"--executor local is this machine: --nodes {self.nodes} needs --executor slurm")
        if self.time is not None:
            _ = self.minutes

    def _check_cluster(self) -> None:
        if self.time is None:
            raise UserError("how long may a segment take? --time 24:00 are 24 hours")
        if (missing := absent()) is not None:
            raise UserError(f"{missing}: submit from a login node, or run here with --executor local")

    def stages(self) -> list[tuple[str, Request]]:
        """Each following stage and what it asks for.

        Raises:
            UserError: `--then` is not written as it should be.
        """
        return [(each.partition(":")[0], self._changed(each)) for each in self.then]

    def _changed(self, then: str) -> Request:
        settings: dict[str, int | str] = {}
        kinds = {field.name: str(field.type) for field in fields(self)}
        for setting in filter(None, then.partition(":")[2].split(",")):
            key, _, value = setting.partition("=")
            key = key.strip().replace("-", "_")
            if key not in _CHANGED:
                raise UserError(
                    f"--then {then}: {setting!r} is none of {', '.join(_CHANGED)}, each with =VALUE"
                )
            if "int" in kinds[key] and not value.isdecimal():
                raise UserError(f"--then {then}: {key} takes a number, not {value!r}")
            settings[key] = int(value) if "int" in kinds[key] else value
        changed = replace(self, then=(), **settings)  # pyright: ignore[reportArgumentType]
        changed.check()
        return changed

    def options(self) -> dict[str, str | bool]:
        """`--sbatch KEY=VALUE` by key."""
        pairs = (each.removeprefix("--").partition("=") for each in self.sbatch)
        return {key: value if given else True for key, given, value in pairs}
