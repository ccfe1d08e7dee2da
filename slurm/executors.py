"""Handing jobs to submitit: to Slurm, or to a process in the background of this machine."""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from subprocess import SubprocessError

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from datasets.errors import UserError
from slurm.job import Job, supervised
from slurm.request import Request
from slurm.snapshot import Snapshot
from slurm.trials import Trial

Handed = submitit.Job[None]

_WARNING = 120
"""Seconds between the warning that time is over and the end."""
_FOREVER = 60 * 24 * 365
"""Minutes, for what has no limit of submitit's."""


def to_slurm(request: Request, found: Sequence[Trial], top: Path, code: Snapshot) -> list[Handed]:
    """Submit runs, as one job or as one array.

    The job is not a step (`use_srun=False`): on the first node, the supervisor sees what a batch script sees,
    and the srun that it starts inherits nothing of another one's step.

    Args:
        request: what each run gets.
        found: the runs.
        top: what they have in common: the directory of scripts and logs, and the name of the job.
        code: what they run.

    Raises:
        UserError: Slurm does not take it, with its own words.
    """
    python = shlex.quote(sys.executable)
    executor = submitit.AutoExecutor(top / "slurm", cluster="slurm", slurm_python=f"exec {python}")
    copy = shlex.quote(str(code.folder))
    given = {
        "slurm_partition": request.partition,
        "slurm_account": request.account,
        "slurm_array_parallelism": request.at_once,
    }
    executor.update_parameters(
        name=_name(top),
        timeout_min=request.minutes,
        nodes=request.nodes,
        tasks_per_node=request.tasks,
        gpus_per_node=request.gpus or 0,
        cpus_per_task=request.cores,
        stderr_to_stdout=True,
        slurm_signal_delay_s=_WARNING,
        slurm_use_srun=False,
        slurm_setup=[
            "trap '' TERM USR2",  # until the supervisor, which this shell becomes, has a handler
            f"source {copy}/slurm/env.sh",
            f"export PYTHONPATH={copy}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
        ],
        slurm_additional_parameters={"requeue": True, "dependency": "singleton", **request.options()},
        **{name: value for name, value in given.items() if value is not None},
    )
    srun = ("srun", "--kill-on-bad-exit=1", sys.executable)
    return _handed(executor, [Job((_command(srun, trial),)) for trial in found])


def to_background(request: Request, found: Sequence[Trial], top: Path, code: Snapshot) -> Handed:
    """Start runs in one process of this machine, one after the other; it outlives this one."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.tasks}")
    launcher = (sys.executable, *(torchrun if request.tasks > 1 else ()))
    path = os.pathsep.join(filter(None, (str(code.folder), os.environ.get("PYTHONPATH"))))
    python = shlex.join(["env", f"PYTHONPATH={path}", "PYTHONSAFEPATH=1", sys.executable])
    executor = submitit.AutoExecutor(top / "slurm", cluster="local", local_python=python)
    executor.update_parameters(
        timeout_min=_FOREVER,
        gpus_per_node=request.gpus or 0,
        tasks_per_node=1,
        stderr_to_stdout=True,
    )
    limit: tuple[str, ...] = ()
    if request.time is not None:
        limit = ("timeout", "--preserve-status", f"--kill-after={_WARNING}", f"{request.minutes}m")
    commands = tuple((*limit, *_command(launcher, trial)) for trial in found)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited: it outlives the terminal, too
    try:
        return _handed(executor, [Job(commands)])[0]
    finally:
        signal.signal(signal.SIGHUP, before)


def _command(launcher: Sequence[str], trial: Trial) -> tuple[str, ...]:
    return supervised(launcher, trial.arguments, out=str(trial.out))


def _handed(executor: submitit.AutoExecutor, work: Sequence[Job]) -> list[Handed]:
    try:
        with redirect_stderr(StringIO()), executor.batch():  # what sbatch says is in the error, too
            handed = [executor.submit(job) for job in work]
    except (FailedJobError, FailedSubmissionError, SubprocessError) as error:
        said = [line.partition("error:")[2] or line for line in str(error).splitlines() if line.strip()]
        words = "; ".join(" ".join(line.split()) for line in said)
        raise UserError(f"Slurm does not take the job: {words}") from error
    except OSError as error:
        raise UserError(f"the job cannot be written to {executor.folder} ({error.strerror})") from error
    return handed


def _name(top: Path) -> str:
    """One for each run directory: it is what `singleton` goes by."""
    return f"{top.name}-{hashlib.blake2b(os.fsencode(top), digest_size=3).hexdigest()}"
