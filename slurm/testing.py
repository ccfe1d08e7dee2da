"""A Slurm of its own on this machine, for tests: munge, a controller and several nodes on private ports.

    with Cluster(nodes=2) as cluster:
        job = cluster.submit("slurm/stage1.sh", "--recipe", "tiny.py", options=["--nodes=2"])
        job.wait("COMPLETED")

Each node is a `slurmd` on this machine, as Slurm's own tests do it, and belongs to one job at a time. There
are two partitions; jobs in `high` preempt those in `low`, which then have 20 seconds. Everything, also what
jobs leave behind, descends from one keeper process, which ends all of it when the cluster is left or whoever
started it dies. Needs root, and the Debian packages slurm-wlm and munge.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self

from datasets.errors import UserError
from slurm.keeper import program

GRACE = 20
"""Seconds between the warning of a preempted job and its end."""
LOST_AFTER = 25
"""Seconds after which a node that does not answer is down, and its jobs are requeued."""

_REVOKED = timedelta(seconds=2)
"""For which nodes refuse a job that they were just told to end; their clocks count whole seconds."""
_CONFIGURATION = """
ClusterName=medley
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2
JobRequeue=1
KillWait=10
MessageTimeout=60
SlurmdTimeout={lost}
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
{nodes}
PartitionName=DEFAULT Nodes=ALL OverSubscribe=EXCLUSIVE
PartitionName=low Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no Slurm can be started on this machine, in words, or None."""
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if program(name) is None]
    if absent:
        return f"no {', '.join(absent)} on this machine: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "only root can start a Slurm"


class Cluster:
    """The running Slurm. Leave it, and nothing of it is left."""

    def __init__(self, *, nodes: int = 2) -> None:
        """Start it; takes about three seconds.

        Raises:
            UserError: it cannot be started here, with what the keeper said.
        """
        reason = missing()
        if reason is not None:
            raise UserError(reason)
        # Not pytest's own directories: the path of a socket has 108 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.nodes = [f"m{number}" for number in range(1, nodes + 1)]
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "SBATCH_"))
            },
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        self._configure()
        command = [sys.executable, "-m", "slurm.keeper", str(self.folder), *self.nodes]
        self._keeper = subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for whoever started it, and leaves it then
        )
        try:
            self._told()
            for node in self.nodes:
                self.wait_for(lambda node=node: self._has_come(node), f"{node} to be idle")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the cluster and of its jobs, and remove its files."""
        assert self._keeper.stdin is not None
        with suppress(BrokenPipeError):
            self._keeper.stdin.close()
        self._keeper.wait(timeout=300)

    def submit(
        self,
        script: str | Path,
        *arguments: str,
        options: Sequence[str] = (),
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Job:
        """`sbatch OPTIONS SCRIPT ARGUMENTS` in a directory, with more variables."""
        said = self.run(
            "sbatch", "--parsable", *options, str(script), *arguments, cwd=cwd, environment=environment
        )
        return Job(self, int(said.partition(";")[0]))

    def run(
        self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> str:
        """What a command of this Slurm prints.

        Raises:
            CalledProcessError: it failed; what it said is among its notes.
        """
        environment = {**self.environment, **(environment or {})}
        try:
            done = subprocess.run(
                command, cwd=cwd, env=environment, check=True, capture_output=True, text=True, timeout=180
            )
        except subprocess.CalledProcessError as error:
            error.add_note(error.stderr)
            raise
        return done.stdout

    def state(self, node: str) -> str:
        """IDLE, ALLOCATED, DOWN*, ..."""
        return _fields(self.run("scontrol", "--oneliner", "show", "node", node))["State"]

    def kill_node(self, node: str, *, jobs: bool) -> None:
        """Kill a node's daemon with -9, as if it had been lost; with its jobs, or leaving these alone."""
        daemon = int((self.folder / f"{node}.pid").read_text())
        processes = [
            process for process in self.processes() if process.variables.get("SLURMD_NODENAME") == node
        ]
        os.kill(daemon, signal.SIGKILL)
        # The parent of a task is the step's daemon: it would report the task's end.
        steps = {process.parent for process in processes if _title(process.parent).startswith("slurmstepd")}
        for each in [*steps, *(process.id for process in processes)] if jobs else []:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)

    def return_node(self, node: str) -> None:
        """Start a lost node's daemon again."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(f"{node}\n")
        self._keeper.stdin.flush()
        self._told()

    def settle(self) -> None:
        """End every job, bring lost nodes back, and wait until all are idle."""
        jobs = self.run("squeue", "--noheader", "--format=%A").split()
        if jobs:
            self.run("scancel", *jobs)
        for each in self.processes():
            with suppress(ProcessLookupError):
                os.kill(each.id, signal.SIGKILL)
        for node in self.nodes:
            daemon = Process.read(int((self.folder / f"{node}.pid").read_text()))
            if daemon is None or daemon.variables.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
                self.return_node(node)
        for node in self.nodes:
            self.wait_for(lambda node=node: self.state(node) == "IDLE", f"{node} to be idle")

    def processes(self) -> list[Process]:
        """What jobs of this cluster run, at this moment."""
        ours = (Process.read(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        conf = self.environment["SLURM_CONF"]
        return [
            each
            for each in ours
            if each is not None
            and each.variables.get("SLURM_CONF") == conf
            and "SLURM_JOB_ID" in each.variables
        ]

    def wait_for(self, condition: Callable[[], object], what: str, *, seconds: float = 300) -> None:
        """Wait until something holds.

        Raises:
            TimeoutError: it did not, with the queue and the end of the controller's log.
        """
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                log = self.folder / "slurmctld.log"
                lines = log.read_text().splitlines()[-20:] if log.exists() else []
                raise TimeoutError("\n".join([f"waited {seconds} s for {what}", self.run("squeue"), *lines]))
            time.sleep(0.05)

    def _configure(self) -> None:
        controller, *ports = _free_ports(1 + len(self.nodes))
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2"
            for node, port in zip(self.nodes, ports, strict=True)
        )
        text = _CONFIGURATION.format(
            host=host, controller=controller, folder=self.folder, nodes=nodes, grace=GRACE, lost=LOST_AFTER
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(random.SystemRandom().randbytes(64))
        key.chmod(0o600)

    def _has_come(self, node: str) -> bool:
        with suppress(subprocess.CalledProcessError):  # the controller has not come itself
            return self.state(node) == "IDLE"
        return False

    def _told(self) -> None:
        """Wait until the keeper has done what it was asked to."""
        assert self._keeper.stdout is not None
        said = self._keeper.stdout.readline().strip()
        if said != "ready":
            raise UserError(f"no Slurm could be started here: {said}")


@dataclass(frozen=True, slots=True)
class Job:
    """A job of a cluster."""

    cluster: Cluster
    id: int

    def show(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        return _fields(self.cluster.run("scontrol", "--oneliner", "show", "job", str(self.id)))

    @property
    def state(self) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.show()["JobState"]

    @property
    def restarts(self) -> int:
        """How often Slurm has started it again."""
        return int(self.show()["Restarts"])

    @property
    def output(self) -> str:
        """What it has printed, over all its starts."""
        path = Path(self.show()["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, *states: str, seconds: float = 300) -> None:
        """Wait until it is in one of these states.

        Raises:
            TimeoutError: it is not, with what it has printed.
        """
        try:
            self.cluster.wait_for(
                lambda: self.state in states, f"job {self.id} to be {'/'.join(states)}", seconds=seconds
            )
        except TimeoutError as error:
            error.add_note(f"{self.show()}\n{self.output[-6000:]}")
            raise

    def hasten(self) -> None:
        """Start it as soon as it can be, where a time is all it waits for.

        Not in the second in which it was put back: nodes take that for the start that they were told to end.
        """
        shown = self.show()
        waited = datetime.now() - datetime.fromisoformat(shown["SubmitTime"])
        if (shown["JobState"], shown["Reason"]) == ("PENDING", "BeginTime") and waited > _REVOKED:
            with suppress(subprocess.CalledProcessError):  # it has begun or is still being put back
                self.cluster.run("scontrol", "update", f"JobId={self.id}", "StartTime=now")

    def signal(self, name: str) -> None:
        """Send the tasks of all its ranks a signal, as Slurm does before a time limit."""
        self.cluster.run("scancel", f"--signal={name}", str(self.id))

    def cancel(self) -> None:
        """What a user does who wants it no more."""
        self.cluster.run("scancel", str(self.id))

    def tasks(self) -> dict[int, Process]:
        """The processes of its ranks, at this moment; without what these have started themselves."""
        mine = [each for each in self.cluster.processes() if each.variables["SLURM_JOB_ID"] == str(self.id)]
        # The batch script has the rank 0 too, and is no step.
        tasks = [each for each in mine if "SLURM_STEP_ID" in each.variables]
        others = {each.id for each in tasks}
        return {int(each.variables["SLURM_PROCID"]): each for each in tasks if each.parent not in others}


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a job, as /proc shows it."""

    id: int
    parent: int
    variables: dict[str, str]

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return Path(f"/proc/{self.id}").exists()

    @classmethod
    def read(cls, number: int) -> Process | None:
        """None where it is gone, or not ours to see."""
        try:
            block = Path(f"/proc/{number}/environ").read_bytes().decode(errors="replace")
            # The name, in brackets, may hold anything.
            parent = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return None
        return cls(number, parent, dict(re.findall(r"([^=\0]+)=([^\0]*)", block)))


def _fields(text: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", text))


def _title(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that the kernel gives to connections."""
    held: list[socket.socket] = []
    while len(held) < count:
        with suppress(OSError):
            held.append(socket.create_server(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000))))
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports
