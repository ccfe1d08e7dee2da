"""Submit: `python -m slurm.submit --nodes 4 --gpus 8 --time 24:00 -- --recipe stages --stage one`.

Checks the command line as the job would read it, copies the code, and hands the job to submitit: to Slurm,
to a process in the background (`--executor local`), or to this one (`--executor debug`). A Slurm job runs
what the batch scripts run: the supervisor on its first node, which starts one process per GPU with srun,
starts them again after a crash, and puts the job back into the queue when its time is over.

Jobs of one run directory have one name and are each other's `singleton`: they never train in it at once, and
a later one waits until the earlier ones have ended for good. A dependency on success (afterok) would be
dropped for ever by one failure, also when the failed job is put back; here the run directory tells whether a
stage is finished, and the next stage says so in one sentence if it is not.

Exit codes: 0 submitted (with debug: what the run came to), 2 the user can mend it.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import submitit
import tyro

from datasets.commands import run
from datasets.errors import UserError
from slurm import jobs
from slurm.executors import Handed, to_background, to_slurm
from slurm.request import Request
from slurm.snapshot import Snapshot, take
from slurm.trials import Trial, check, frozen, of_stage, trials

_ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    request = tyro.cli(Request, args=arguments[:end], prog="python -m slurm.submit")
    try:
        request.check()
        found = trials(arguments[end + 1 :], request.sweep)
        phases = _phases(request, found)
        if request.executor == "debug":
            return _debug([trial for _, chosen in phases for trial in chosen])
        submit(request, phases)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def submit(request: Request, phases: Sequence[tuple[Request, list[Trial]]]) -> None:
    """Hand everything over and say how to follow it.

    Args:
        request: checked.
        phases: what each stage asks for, and the runs.

    Raises:
        UserError: a run cannot be started, or the cluster refuses.
    """
    first = phases[0][1]
    for asked, chosen in phases:
        for trial in chosen:
            check(trial, asked)
    top = first[0].out.parent if request.sweep else first[0].out
    code = take(_ROOT, top / "code", {name: path for trial in first for name, path in trial.files(_ROOT)})
    _say("code", str(code))
    phases = [(asked, [frozen(trial, _ROOT, code.folder) for trial in chosen]) for asked, chosen in phases]
    started: list[str] = []
    if request.executor == "local":
        together = [trial for _, chosen in phases for trial in chosen]
        handed = to_background(request, together, top, code)
        started.append(handed.job_id)
        _say("process", f"{handed.job_id}{f': {len(together)} runs in turn' if len(together) > 1 else ''}")
        _tell(request, together, [handed] * len(together), code)
    else:
        for asked, chosen in phases:
            handed = to_slurm(asked, chosen, top, code)
            after = f", after {started[-1]}" if started else ""
            started.append(handed[0].job_id.partition("_")[0])
            _say("job", f"{started[-1]}: {_size(asked, chosen)}{after}")
            _tell(asked, chosen, handed, code)
    _say("watch", f"python -m slurm.status {shlex.quote(str(top))}")
    _say("stop", f"{'kill' if request.executor == 'local' else 'scancel'} {' '.join(started)}")


def _phases(request: Request, found: list[Trial]) -> list[tuple[Request, list[Trial]]]:
    """The stages that are jobs of their own, in order."""
    then = request.stages()
    if then and any(trial.command.stage is None for trial in found):
        raise UserError(f"--then {then[0][0]} follows a stage: name the first one after --, as --stage NAME")
    return [(request, found), *((asked, [of_stage(trial, name) for trial in found]) for name, asked in then)]


def _debug(found: Sequence[Trial]) -> int:
    """Run everything here and now, with the code as it is; the exit code of the first that fails."""
    from pretrain import launch

    for trial in found:
        executor = submitit.AutoExecutor(trial.out / "slurm", cluster="debug")
        code = executor.submit(launch.main, [*trial.arguments, "--out", str(trial.out)]).result()
        if code:
            return code
    return 0


def _tell(request: Request, chosen: Sequence[Trial], handed: Sequence[Handed], code: Snapshot) -> None:
    """Record and print what each run was handed over as."""
    for trial, job in zip(chosen, handed, strict=True):
        log = str(job.paths.stdout)
        record = jobs.Submitted(
            time=round(time.time(), 3),
            host=os.uname().nodename,
            executor=request.executor,
            job=job.job_id,
            log=log,
            stage=trial.command.stage or "",
            nodes=request.nodes,
            tasks=request.tasks,
            code=str(code.folder),
            commit=code.commit,
            command=list(trial.arguments),
        )
        jobs.record(trial.out, record)
        if trial.settings:
            _say("", f"{job.job_id}  {'  '.join(trial.settings)}")
        _say("run", str(trial.out))
        _say("log", f"tail -F {shlex.quote(log)}")


def _size(request: Request, chosen: Sequence[Trial]) -> str:
    stage = chosen[0].command.stage
    kind = "GPUs" if request.gpus else "processes"
    return ", ".join(
        [
            *([f"{len(chosen)} runs"] if len(chosen) > 1 else []),
            *([f"stage {stage}"] if stage else []),
            f"{request.nodes} nodes of {request.tasks} {kind}",
            f"segments of {request.minutes // 60} h {request.minutes % 60:02} min",
        ]
    )


def _say(what: str, text: str) -> None:
    sys.stdout.write(f"{what:9}{text}\n")


if __name__ == "__main__":
    run(main)
