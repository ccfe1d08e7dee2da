"""How this process was started: alone, by torchrun or by srun. The only file that reads RANK, SLURM_*, ...

Standard library only: the supervisor must start in no time, and signals must be met before torch is there.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from datasets.errors import UserError

_NO_STEP = 0xFFFF_0000
"""Slurm counts the steps of a job from 0; a batch script or an interactive shell has a number above this."""
_GROUP = re.compile(r"(\d+)(?:\(x(\d+)\))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This process among all that train together."""

    by: Literal["nobody", "torchrun", "srun"]
    """Who started it."""
    rank: int = 0
    world: int = 1
    local: int = 0
    """Its number among the processes of its machine."""
    beside: int | None = 1
    """Processes of its machine; None where whoever started it does not say."""
    node: str = ""
    """The name its machine goes by; machines of a cluster need not have a name that resolves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The Slurm job that this process belongs to."""

    id: str
    """123, or 123_4 in an array: there, a number alone may mean the whole array."""
    restart: int
    """How often it was requeued."""
    step: int | None
    """The job step; None in the batch script or an interactive shell."""
    tasks: int
    """Processes that were asked for."""


ATTEMPT = "MEDLEY_ATTEMPT"
"""The environment variable in which the supervisor numbers its starts: JOB.RESTART.NUMBER."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start among those of a job, or of a supervisor on a laptop. The later one has greater numbers."""

    job: str
    restart: int
    number: int

    def __str__(self) -> str:
        return f"{self.job}.{self.restart}.{self.number}"


def attempt_here(environment: Mapping[str, str] = os.environ) -> Attempt | None:
    """The start that this process belongs to; None where nobody numbers them."""
    if said := environment.get(ATTEMPT):
        job, restart, number = said.rsplit(".", 2)
        return Attempt(job=job, restart=int(restart), number=int(number))
    job = job_here(environment)
    return None if job is None else Attempt(job=job.id, restart=job.restart, number=0)


def job_here(environment: Mapping[str, str] = os.environ) -> Job | None:
    """The Slurm job that this process runs in, or None."""
    number = environment.get("SLURM_JOB_ID")
    if not number:
        return None
    step = environment.get("SLURM_STEP_ID", "")
    array, element = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return Job(
        id=f"{array}_{element}" if array and element else number,
        restart=int(environment.get("SLURM_RESTART_COUNT") or 0),
        step=int(step) if step.isdecimal() and int(step) < _NO_STEP else None,
        tasks=int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1),
    )


def place_here(environment: Mapping[str, str] = os.environ) -> Place:
    """Where this process stands, from what its environment says.

    The variables of torchrun count before those of Slurm: it may itself have been started by srun.

    Raises:
        UserError: the variables contradict each other.
    """
    node = environment.get("SLURMD_NODENAME") or socket.gethostname()
    if "WORLD_SIZE" in environment or "RANK" in environment:
        beside = environment.get("LOCAL_WORLD_SIZE")
        return Place(
            by="torchrun",
            rank=int(environment.get("RANK", "0")),
            world=int(environment.get("WORLD_SIZE", "1")),
            local=int(environment.get("LOCAL_RANK", "0")),
            beside=int(beside) if beside else None,
            node=node,
        )
    job = job_here(environment)
    if job is None or job.step is None or "SLURM_PROCID" not in environment:
        return Place(by="nobody", node=node)
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    nodes = tasks_per_node(counts)
    if sum(nodes) != job.tasks:
        raise UserError(
            f"Slurm speaks of {job.tasks} tasks and of {counts or 'none'} on its nodes: start them with "
            "`srun python -m pretrain.launch ...`"
        )
    return Place(
        by="srun",
        rank=int(environment["SLURM_PROCID"]),
        world=job.tasks,
        local=int(environment.get("SLURM_LOCALID", "0")),
        beside=nodes[int(environment.get("SLURM_NODEID", "0"))],
        node=node,
    )


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short way to write how many tasks each node has: `2(x3),1` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for group in filter(None, text.split(",")):
        match = _GROUP.fullmatch(group.strip())
        if match is None:
            raise UserError(f"SLURM_TASKS_PER_NODE is {text!r}, which is no list such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def alone_among(environment: Mapping[str, str] = os.environ) -> str | None:
    """What to say where Slurm gave several tasks and this is one process that nobody multiplied."""
    job = job_here(environment)
    if job is None or job.tasks == 1 or place_here(environment).by != "nobody":
        return None
    return (
        f"warning: this Slurm job has {job.tasks} tasks and trains with one process: "
        "start it with `srun python -m pretrain.launch ...`"
    )
