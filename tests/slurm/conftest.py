"""A Slurm for the whole session, and training under it that is compared with training nothing interrupted.

Where no Slurm can be started its tests skip, and say why; under CI they fail instead.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain.starts import read_starts
from slurm import testing

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = Path(__file__).with_name("tiny.py")
PATIENCE = 600.0
"""Seconds, on a machine that does other things too."""


@pytest.fixture(scope="session")
def cluster():
    reason = testing.missing()
    if reason is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs a real Slurm: {reason}")
    with testing.Cluster(nodes=2) as cluster:
        yield cluster


@dataclass(frozen=True)
class Training:
    """A run of tests/slurm/tiny.py by the batch scripts, on two ranks."""

    cluster: testing.Cluster
    out: Path
    oracle: list[str]
    """The ledger of both stages, on two ranks, that nothing interrupted."""

    def submit(
        self, stage: str, *flags: str, pace: str, options: tuple[str, ...] = (), path: str = ""
    ) -> testing.Job:
        """`sbatch slurm/STAGE.sh`, on CPUs. See tiny.py for the pace."""
        before = [path] if path else []
        return self.cluster.submit(
            f"slurm/{stage}.sh",
            *("--recipe", str(TINY), *flags),
            options=(
                *("--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=60"),
                *(f"--output={self.out.parent}/{stage}.out", *options),
            ),
            cwd=ROOT,
            environment={
                "RUN_DIR": str(self.out),
                "PACE": pace,
                "STALLS": str(self.stalls),
                "PATH": os.pathsep.join([*before, str(Path(sys.executable).parent), os.environ["PATH"]]),
            },
        )

    @property
    def stalls(self) -> Path:
        """As long as it exists, no checkpoint gets to the disk."""
        return self.out.parent / "stalls"

    @property
    def ledger(self) -> list[str]:
        """Its lines, as they stand there."""
        path = self.out / "ledger"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def lost(self) -> list[int]:
        """For each start, how many steps were done again."""
        return [start.lost for start in read_starts(self.out / "starts.jsonl")]

    def wait_for_step(self, step: int, *, starts: int = 1) -> None:
        """Wait until a step is done, and after that start."""
        self.cluster.wait_for(
            lambda: len(self.ledger) >= step and len(self.lost) >= starts, f"step {step}", seconds=PATIENCE
        )

    def wait_for_checkpoint(self, step: int) -> None:
        """Wait until what was done up to a step would survive a crash."""
        path = self.out / "checkpoints" / f"step-{step:08d}"
        self.cluster.wait_for(path.exists, f"the checkpoint of step {step}", seconds=PATIENCE)

    def finish(self, job: testing.Job, *, steps: int = 40, hasten: bool = True) -> None:
        """Wait for the job, which must have done these steps as if nothing had happened.

        A requeued one waits ten seconds for its turn, which can be hastened from outside.
        """

        def ended() -> bool:
            if hasten:
                job.hasten()
            return job.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

        self.cluster.wait_for(ended, f"job {job.id} to end", seconds=PATIENCE)
        output = job.output
        assert job.state == "COMPLETED", output
        assert self.ledger == self.oracle[:steps], output
        assert "was run again and differs" not in output


@pytest.fixture(scope="session")
def oracle(tmp_path_factory) -> list[str]:
    out = tmp_path_factory.mktemp("oracle") / "run"
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pretrain.launch"]
    command = [sys.executable, "-m", *several, "--recipe", str(TINY), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=PATIENCE)
    ledger = (out / "ledger").read_text().splitlines()
    assert [int(line.split()[0]) for line in ledger] == list(range(1, 61))
    return ledger


@pytest.fixture
def training(cluster, oracle, tmp_path):
    yield Training(cluster, tmp_path / "run", oracle)
    cluster.settle()
