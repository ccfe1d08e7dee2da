"""The Slurm of these tests is a real one, alone, and gone when it is left."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from slurm.testing import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

ROOT = Path(__file__).resolve().parent.parent.parent


def script(folder: Path, body: str) -> Path:
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n#SBATCH --output={folder}/job.out\n{body}\n")
    return path


def of(cluster: Cluster) -> list[int]:
    """Every process that was started with the cluster's configuration or works in its folder."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and str(cluster.folder).encode() in (
                (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            ):
                found.append(int(entry.name))
    return found


def test_a_job_runs_on_two_nodes(cluster, tmp_path):
    body = 'srun --label bash -c "echo \\$SLURM_PROCID of \\$SLURM_NTASKS on \\$SLURMD_NODENAME"'
    job = cluster.submit(script(tmp_path, body), options=["--nodes=2"])
    job.wait("COMPLETED")
    assert sorted(job.output.splitlines()) == ["0: 0 of 2 on m1", "1: 1 of 2 on m2"]
    assert job.restarts == 0


def test_left_it_leaves_no_process_and_no_file(cluster, tmp_path):
    """A second one beside the first, with a job that has put a process of its own aside."""
    with Cluster(nodes=1) as second:
        job = second.submit(script(tmp_path, "setsid sleep 600 & sleep 600"))
        second.wait_for(lambda: len(second.processes()) >= 3, "the job's processes")
        pids = of(second)
        assert len(pids) > 6
        assert job.state == "RUNNING"
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not second.folder.exists()
    cluster.wait_for(lambda: cluster.state("m1") == "IDLE", "the first one to be as it was")


def test_it_ends_with_whoever_started_it(tmp_path):
    code = "from slurm.testing import Cluster; print(Cluster(nodes=1).folder, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        folder = owner.stdout.readline().strip()
        os.kill(owner.pid, signal.SIGKILL)
    until = time.monotonic() + 120
    while Path(folder).exists():
        assert time.monotonic() < until
        time.sleep(0.05)
