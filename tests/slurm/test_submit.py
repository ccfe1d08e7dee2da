"""What is handed to Slurm, to this machine and to this process, and what comes of it."""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import slurm.submit
from pretrain import launch
from slurm import jobs
from slurm.status import statuses
from slurm.submit import main

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ["--recipe", "laptop", "--stages.one.steps", "6", "--stages.one.batch", "8"]
CPUS = ["--gpus", "0", "--time", "1:00"]
STAGES = ["--recipe", "stages:small", "--stage", "one"]

STANDIN = """
import json, os, pathlib, signal, sys, time

given = sys.argv[1:]
waits = "--seed" in given and given[given.index("--seed") + 1] == "60"
if waits:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
out = pathlib.Path([word for at, word in zip(["", *given], given) if at == "--out"][-1])
mine = {name: value for name, value in os.environ.items() if name.startswith(("SLURM_", "SUBMITIT_"))}
began = sum(1 for _ in out.glob("seen-*"))
rank = os.environ.get("SLURM_PROCID", "0")
record = {"arguments": given, "environment": mine, "code": __file__, "cwd": os.getcwd()}
part = out / f"part-{began}-{rank}"
part.write_text(json.dumps({**record, "time": time.time()}))
part.rename(out / f"seen-{began}-{rank}.json")
if "--seed" in given and given[given.index("--seed") + 1] == "75" and "SLURM_RESTART_COUNT" not in os.environ:
    (out / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
    sys.exit(75)
if waits:
    time.sleep(600)
"""
"""In place of pretrain/launch.py: writes down how it was called."""


def repository(folder: Path) -> Path:
    """A copy of the code that trains nothing."""
    for package in ("datasets", "objectives", "pretrain", "slurm"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pretrain" / "launch.py").write_text(STANDIN)
    return folder


@pytest.fixture
def standin(tmp_path, monkeypatch):
    root = repository(tmp_path / "repository")
    monkeypatch.setattr(slurm.submit, "_ROOT", root)
    return root


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A Slurm that takes everything and starts nothing; what it was given, in order."""
    (tmp_path / "bin").mkdir()
    for name in ("srun", "sinfo", "squeue"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "sbatch").write_text(
        f'#!/bin/sh\necho "$1" >> {tmp_path}/given\nn=$(wc -l < {tmp_path}/given)\n'
        'echo "Submitted batch job $((6 + n))"\n'
    )
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "bin" / "sbatch"


def seen(out: Path) -> list[dict]:
    found = (json.loads(path.read_text()) for path in out.glob("seen-*.json"))
    return sorted(found, key=lambda each: each["time"])


def until(condition, *, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_what_slurm_is_given(standin, sbatch, tmp_path, capsys):
    out = tmp_path / "a run"
    asked = ["--nodes", "4", "--gpus", "8", "--time", "24:00", "--partition", "long"]
    more = ["--sbatch", "qos=high", "--sbatch", "exclusive"]
    assert main([*asked, *more, "--", *TINY, "--out", str(out)]) == 0
    (code,) = (out / "code").iterdir()
    script = (out / "slurm" / "7_submission.sh").read_text().splitlines()
    options = {line.removeprefix("#SBATCH --") for line in script if line.startswith("#SBATCH")}
    name = next(each for each in options if each.startswith("job-name="))
    assert options - {name} == {
        "nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12", "time=1440",
        "signal=USR2@120", "requeue", "dependency=singleton", "open-mode=append", "wckey=submitit",
        "partition=long", "qos=high", "exclusive", f"output='{out}/slurm/%j_0_log.out'",
    }  # fmt: skip
    commands = [line for line in script if line and not line.startswith("#")]
    assert commands == [
        "trap '' TERM USR2",
        f"source '{code}'/slurm/env.sh",
        f"export PYTHONPATH='{code}'${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
        "export SUBMITIT_EXECUTOR=slurm",
        f"exec {sys.executable} -u -m submitit.core._submit '{out}/slurm'",
    ]
    (job,) = jobs.read(out)
    assert (job.job, job.executor, job.nodes, job.tasks, job.code) == ("7", "slurm", 4, 8, str(code))
    said = capsys.readouterr().out
    assert f"job      7: 4 nodes of 8 GPUs, segments of 24 h 00 min\nrun      {out}\n" in said
    assert f"tail -F '{out}/slurm/7_0_log.out'" in said
    assert f"watch    python -m slurm.status '{out}'\nstop     scancel 7\n" in said


def test_a_sweep_is_one_array(standin, sbatch, tmp_path, capsys):
    given = ["--sweep", "seed=3,4", "--sweep", "stages.one.optim.lr=1e-4,3e-4", "--at-once", "2"]
    assert main([*CPUS, *given, "--", *TINY, "--out", str(tmp_path / "sweep")]) == 0
    script = (tmp_path / "sweep" / "slurm" / "7_submission.sh").read_text()
    assert "#SBATCH --array=0-3%2" in script
    assert len((tmp_path / "given").read_text().splitlines()) == 1
    names = ["seed=3_lr=1e-4", "seed=3_lr=3e-4", "seed=4_lr=1e-4", "seed=4_lr=3e-4"]
    found = [list(jobs.read(tmp_path / "sweep" / name)) for name in names]
    assert [job.job for (job,) in found] == ["7_0", "7_1", "7_2", "7_3"]
    assert len(list((tmp_path / "sweep" / "code").iterdir())) == 1
    assert "7_2  seed=4  stages.one.optim.lr=1e-4" in capsys.readouterr().out


def test_a_stage_follows_in_a_job_of_its_own(standin, sbatch, tmp_path, capsys):
    given = ["--gpus", "8", "--nodes", "32", "--time", "24:00", "--then", "two:nodes=16,time=12:00"]
    run = ["--recipe", "stages", "--data", "scenes", "--stage", "one", "--out", str(tmp_path / "run")]
    assert main([*given, "--", *run]) == 0
    one, two = jobs.read(tmp_path / "run")
    assert (one.job, one.stage, one.nodes) == ("7", "one", 32)
    assert (two.job, two.stage, two.nodes) == ("8", "two", 16)
    assert one.code == two.code
    assert two.command == [*run, "--stage", "two"]
    scripts = [(tmp_path / "run" / "slurm" / f"{job}_submission.sh").read_text() for job in (7, 8)]
    names = [re.findall("--job-name=.*", script) for script in scripts]
    assert names[0] == names[1]
    assert len(names[0]) == 1
    assert all("#SBATCH --dependency=singleton\n" in script for script in scripts)
    assert "#SBATCH --nodes=16\n" in scripts[1]
    assert "#SBATCH --time=720\n" in scripts[1]
    said = capsys.readouterr().out
    assert "job      7: stage one, 32 nodes of 8 GPUs, segments of 24 h 00 min\n" in said
    assert "job      8: stage two, 16 nodes of 8 GPUs, segments of 12 h 00 min, after 7\n" in said
    assert said.endswith("stop     scancel 7 8\n")


@pytest.mark.parametrize(
    ("asked", "given", "said"),
    [
        (
            [*CPUS, "--then", "three"],
            STAGES,
            "--then three: this run has no stage of that name",
        ),
        (
            [*CPUS, "--then", "one"],
            STAGES,
            "--then one: it does not follow stage one; their order is one, two",
        ),
        (CPUS, ["--recipe", "stages:small", "--stage", "three"], "three"),
        (CPUS, ["--recipe", "stages", "--stage", "one"], "this recipe names no data"),
        (CPUS, [*TINY, "--explain"], "--explain prints what a run would do"),
        (CPUS, [*TINY, "--plan"], "--plan prints what a run would do"),
        (CPUS, ["--recipe", "laptp"], "unknown recipe 'laptp'; did you mean 'laptop'?"),
        (["--gpus", "8"], TINY, "how long may a segment take"),
        (["--time", "1:00"], TINY, "how many GPUs has a node"),
        (["--gpus", "8", "--time", "1 day"], TINY, "--time 1 day is no time"),
        ([*CPUS, "--then", "two"], TINY, "--then two follows a stage: name the first one after --"),
        (
            [*CPUS, "--nodes", "3"],
            [*TINY, "--deterministic", "elastic"],
            "--shuffle.lanes 8 among 3 ranks: take a number of ranks that divides them",
        ),
    ],
)
def test_nothing_is_submitted_that_could_not_start(sbatch, standin, tmp_path, capsys, asked, given, said):
    assert main([*asked, "--", *given, "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "given").exists()
    assert not (tmp_path / "run" / "slurm").exists()


def test_what_slurm_refuses_is_said_in_its_words(sbatch, standin, tmp_path, capsys):
    sbatch.write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\n"
        "echo 'sbatch: error: Batch job submission failed: Invalid partition name specified' >&2\nexit 1\n"
    )
    assert main([*CPUS, "--partition", "x", "--", *TINY, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "error: Slurm does not take the job: invalid partition specified: x; "
        "Batch job submission failed: Invalid partition name specified\n"
    )
    assert list(jobs.read(tmp_path / "run")) == []


def test_without_a_slurm_that_answers_nothing_is_written(sbatch, standin, tmp_path, capsys):
    sbatch.with_name("sinfo").write_text("#!/bin/sh\necho 'sinfo: fatal: no configuration' >&2\nexit 1\n")
    assert main([*CPUS, "--", *TINY, "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert "no Slurm answers on this machine" in captured.err
    assert not (tmp_path / "run").exists()


def test_in_this_process(tmp_path, monkeypatch):
    """As pretrain.launch itself would be called, with its exit code; stages and runs follow each other."""
    called = []
    monkeypatch.setattr(launch, "main", lambda arguments: called.append(arguments) or 75 * (len(called) > 1))
    out = ["--out", str(tmp_path / "run")]
    assert main(["--executor", "debug", "--then", "two", "--", *STAGES, *out]) == 75
    assert called == [[*STAGES, *out, *out], [*STAGES, *out, "--stage", "two", *out]]
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["slurm"]  # what submitit logs


def test_on_this_machine_runs_follow_each_other(standin, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--executor", "local", "--gpus", "0", "--sweep", "seed=3,4", "--", *TINY]
    assert main([*given, "--data", "here/*.tar", "--out", "sweep"]) == 0
    runs = [tmp_path / "sweep" / f"seed={seed}" for seed in (3, 4)]
    (first,), (second,) = (until(lambda out=out: seen(out)) for out in runs)
    assert first["time"] < second["time"]
    (code,) = (tmp_path / "sweep" / "code").iterdir()
    assert first["code"] == str(code / "pretrain" / "launch.py")
    assert first["cwd"] == str(tmp_path)
    assert (
        first["arguments"][-6:]
        == ["--data", "here/*.tar", "--out", "sweep", "--seed", "3", "--out", str(runs[0])][-6:]
    )
    assert capsys.readouterr().out.startswith(f"code     {code} (")


def test_a_process_of_this_machine_is_stopped_as_it_says(standin, tmp_path, capsys):
    given = ["--executor", "local", "--gpus", "0", "--", *TINY, "--seed", "60"]
    assert main([*given, "--out", str(tmp_path / "run")]) == 0
    until(lambda: seen(tmp_path / "run"))
    (status,) = statuses([tmp_path / "run"], now=time.time())
    (job,) = jobs.read(tmp_path / "run")
    assert (status.state, status.jobs) == ("running", (job.job,))
    assert f"stop     kill {job.job}\n" in capsys.readouterr().out
    os.kill(int(job.job), signal.SIGTERM)
    attempts = tmp_path / "run" / "attempts.jsonl"
    until(lambda: '"end"' in attempts.read_text())
    assert json.loads(attempts.read_text().splitlines()[-1])["code"] == 75
    os.waitpid(int(job.job), 0)
    (status,) = statuses([tmp_path / "run"], now=time.time())
    assert status.state == "interrupted"
