"""What the batch scripts run, as Slurm runs them: a copy of the script, elsewhere. No Slurm is needed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = {"stage1": "one", "stage2": "two"}
ON_CPUS = {"SLURM_GPUS_PER_NODE": "0"}


class Batch:
    """A node on which Slurm starts a script; its python writes down how it was called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.repository = folder, folder / "a repository"
        shutil.copytree(ROOT / "slurm", self.repository / "slurm", ignore=shutil.ignore_patterns("*.py"))
        (folder / "bin").mkdir()
        (folder / "spool").mkdir()
        python = folder / "bin" / "python"
        python.write_text(
            '#!/bin/sh\nenv > "$RECORD/environment"; pwd > "$RECORD/folder"\n'
            'printf "%s\\0" "$@" > "$RECORD/arguments"\n'
        )
        python.chmod(0o755)

    def run(self, stage: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "spool" / "slurm_script").write_text((ROOT / "slurm" / f"{stage}.sh").read_text())
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "RECORD": str(self.folder),
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": str(self.repository),
            **variables,
        }
        return subprocess.run(
            ["bash", str(self.folder / "spool" / "slurm_script"), *arguments],
            cwd=self.folder,
            env={name: value for name, value in environment.items() if value},
            capture_output=True,
            text=True,
            timeout=300,
        )

    @property
    def ran(self) -> list[str]:
        return (self.folder / "arguments").read_text().split("\0")[:-1]

    @property
    def environment(self) -> dict[str, str]:
        lines = (self.folder / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def batch(tmp_path):
    return Batch(tmp_path)


@pytest.mark.parametrize("stage", STAGES)
def test_it_supervises_srun_over_the_launch_of_its_stage(batch, stage):
    done = batch.run(stage, **ON_CPUS)
    assert (done.returncode, done.stderr) == (0, "")
    assert batch.ran == [
        *("-m", "pretrain.supervise", "--"),
        *("srun", "--kill-on-bad-exit=1", "python", "-m", "pretrain.launch"),
        *("--recipe", "stages", "--stage", STAGES[stage], "--out", "runs/stages"),
    ]
    assert (batch.folder / "folder").read_text().strip() == str(batch.repository)


def test_what_follows_the_script_comes_last_and_wins(batch):
    batch.run("stage1", "--recipe", "stages:small", "--data", "my shards/*.tar", "--flag", "", **ON_CPUS)
    assert batch.ran[-6:] == ["--recipe", "stages:small", "--data", "my shards/*.tar", "--flag", ""]
    assert batch.ran.index("stages") < batch.ran.index("stages:small")


def test_the_run_directory_is_the_users_choice(batch):
    batch.run("stage2", RUN_DIR="/big disk/my run", **ON_CPUS)
    (at,) = [at for at, word in enumerate(batch.ran) if word == "--out"]
    assert batch.ran[at + 1] == "/big disk/my run"


def test_ranks_get_the_cores_of_the_job_and_one_thread_each(batch):
    batch.run("stage1", SLURM_CPUS_PER_TASK="12", **ON_CPUS)
    chosen = ("SRUN_CPUS_PER_TASK", "OMP_NUM_THREADS", "PYTHONFAULTHANDLER", "NCCL_DEBUG")
    assert [batch.environment[name] for name in chosen] == ["12", "1", "1", "WARN"]
    batch.run("stage1", OMP_NUM_THREADS="4", NCCL_DEBUG="INFO", **ON_CPUS)
    assert [batch.environment[name] for name in chosen] == ["1", "4", "1", "INFO"]


def test_the_environment_that_is_named_is_entered(batch):
    (batch.folder / "my venv" / "bin").mkdir(parents=True)
    activate = batch.folder / "my venv" / "bin" / "activate"
    activate.write_text("export ENTERED=yes\n")
    assert batch.run("stage1", VENV=str(batch.folder / "my venv"), **ON_CPUS).returncode == 0
    assert batch.environment["ENTERED"] == "yes"
    activate.unlink()
    done = batch.run("stage1", VENV=str(batch.folder / "my venv"), **ON_CPUS)
    assert done.returncode == 2
    assert done.stderr == (f"error: VENV is no virtual environment: {activate} does not exist\n")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {},
            "this job has no GPUs: sbatch --gpus-per-node 8, or to train on CPUs --gpus-per-node 0",
        ),
        (
            {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"},
            "a node of this job has 8 GPUs for 1 ranks: sbatch --ntasks-per-node 8",
        ),
        (
            {"SLURM_SUBMIT_DIR": "/a folder"},
            "call sbatch in the repository's root: there is no /a folder/slurm/env.sh",
        ),
    ],
)
def test_a_mistake_is_one_sentence(batch, variables, said):
    done = batch.run("stage1", **variables)
    assert done.returncode == 2
    assert done.stderr == f"error: {said}\n"
    assert not (batch.folder / "arguments").exists()


@pytest.mark.parametrize(
    ("gpus", "launcher"), [(0, "torchrun --nproc-per-node gpu"), (9, "python"), (None, "python")]
)
def test_outside_a_job_it_says_the_line_for_this_machine(batch, gpus, launcher):
    """It is pasted into the shell that called the script, with nothing left out and each word still one."""
    if gpus is not None:
        (batch.folder / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\necho GPU\nexit {gpus}\n")
        (batch.folder / "bin" / "nvidia-smi").chmod(0o755)
    elif shutil.which("nvidia-smi"):
        pytest.skip("this machine has nvidia-smi")
    flags = ("--data", "my shards/{0..9}.tar", "--title", '$HOME\'s "run"')
    done = batch.run("stage2", *flags, SLURM_JOB_ID="", RUN_DIR="/big disk/run")
    assert done.returncode == 2
    told, line = done.stderr.rstrip("\n").split("; on this machine: ")
    assert (told, done.stderr.count("\n")) == ("error: this is a script for sbatch", 1)
    assert line.startswith(f"{launcher} -m pretrain.launch --recipe stages --stage two --out ")
    words = subprocess.run(["bash", "-c", f'printf "%s\\n" {line}'], capture_output=True, text=True).stdout
    assert words.splitlines()[-6:] == ["--out", "/big disk/run", *flags]


def test_gpus_with_a_rank_each_are_trained_on(batch):
    gpus = {"SLURM_GPUS_PER_NODE": "h200:8", "SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "8"}
    assert batch.run("stage1", **gpus).returncode == 0


def test_both_headers_ask_for_what_interruptions_need():
    headers: dict[str, dict[str, str]] = {}
    for stage in STAGES:
        text = (ROOT / "slurm" / f"{stage}.sh").read_text()
        headers[stage] = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    for stage, header in headers.items():
        assert header["job-name"] == stage
        assert header["gpus-per-node"] == header["ntasks-per-node"]
        assert {"requeue", "nodes", "time"} <= set(header)
        assert header["signal"] == "USR2@120"  # to the ranks; with B: only this shell would hear it
        assert header["open-mode"] == "append"
        assert "/" not in header["output"]  # Slurm makes no folders, and a job without output fails unheard
    assert set(headers["stage1"]) == set(headers["stage2"])


def test_no_script_knows_a_hyper_parameter():
    for script in (ROOT / "slurm").glob("*.sh"):
        code = "\n".join(line.partition("# ")[0] for line in script.read_text().splitlines())
        assert set(re.findall(r"(?<=\s)--[a-z]\S*(?= )", code)) <= {
            *("--kill-on-bad-exit=1", "--recipe", "--stage", "--out"),
            *("--gpus-per-node", "--ntasks-per-node", "--nproc-per-node"),  # in sentences
        }


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None and not os.environ.get("CI"):
        pytest.skip("no shellcheck on this machine: apt-get install shellcheck")
    scripts = [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / ".ci" / "run"]
    command = ["shellcheck", "--external-sources", *map(str, scripts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == ""
    assert done.returncode == 0
