"""What is said of a run: from the files of its directory, and from a Slurm that answers as it is told."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm import jobs, sheet
from slurm.status import main, statuses

ROOT = Path(__file__).resolve().parent.parent.parent
NOW = 1_800_000_000.0
TWO = "# identity: x\nstages:\n  one:\n    steps: 100\n  two:\n    steps: 50\n"


class Directory:
    """A run directory, written piece by piece."""

    def __init__(self, root):
        self.root = root
        root.mkdir()
        (root / "run.yaml").write_text(TWO)

    def append(self, name, **record):
        with (self.root / name).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def start(self, step=0, lost=0, ago=3600.0, **more):
        given = {"stage": "one", "lost": lost, "ranks": 8, "device": "cuda", "changed": [], **more}
        self.append("starts.jsonl", time=NOW - ago, step=step, **given)

    def report(self, step, ago=60.0, **more):
        self.append("metrics.jsonl", step=step, time=NOW - ago, samples=step * 8, **more)

    def ledger(self, steps, ago=1.0):
        path = self.root / "ledger"
        path.write_text(
            "".join(f"{step} 8 {'0' * 16} {'0' * 16} {'0' * 16}\n" for step in range(1, steps + 1))
        )
        os.utime(path, (NOW - ago, NOW - ago))

    def checkpoint(self, step, ago=30.0):
        folder = self.root / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        os.utime(folder / "manifest.json", (NOW - ago, NOW - ago))

    def event(self, event, ago=10.0, **more):
        given = {"attempt": "7.0.1", "job": "7", "restart": 0, "step": 0, "code": None, "reason": "", **more}
        self.append("attempts.jsonl", event=event, time=NOW - ago, **given)

    def submitted(self, job, executor="slurm", host=""):
        handed = jobs.Submitted(
            time=NOW, host=host, executor=executor, job=job, log=f"/logs/{job}_0_log.out", stage="one",
            nodes=1, tasks=8, code="", commit="", command=[],
        )  # fmt: skip
        jobs.record(self.root, handed)

    @property
    def status(self):
        (found,) = statuses([self.root], now=NOW)
        return found


@pytest.fixture
def run(tmp_path):
    return Directory(tmp_path / "run")


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """A squeue that prints lines and ends with a code; it writes down what it was asked."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def answers(*lines, code=0, error=""):
        script = tmp_path / "bin" / "squeue"
        said = "".join(f"echo '{line}'\n" for line in lines)
        script.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\n{said}echo '{error}' >&2\nexit {code}\n")
        script.chmod(0o755)

    answers(code=1, error="slurm_load_jobs error: Unable to contact slurm controller")
    return answers


def test_a_run_that_trains(run, squeue):
    run.start()
    run.start(step=40, lost=5, ago=600.0)
    run.report(20, ago=900.0, **{"perf/samples_per_second": 1.0})
    run.report(60, **{"perf/samples_per_second": 5234.6, "perf/seconds_left": 7320.0})
    run.ledger(64)
    run.checkpoint(40, ago=900.0)
    run.checkpoint(60)
    run.submitted("7")
    squeue("7|7|RUNNING|None|3:12:00|2027-01-01T00:00:00")
    status = run.status
    assert (status.state, status.why, status.jobs) == ("running", "3:12:00 to its limit", ("7",))
    assert (status.stage, status.step, status.steps) == ("one", 64, 150)
    assert (status.samples_per_second, status.seconds_left, status.silent_for) == (5234.6, 7320.0, 1.0)
    assert (status.restarts, status.lost_steps) == (1, 5)
    assert (status.checkpoint, status.checkpoint_age) == (60, 30.0)
    assert sheet.lines(status)["speed"] == "5,235 samples/s, 2 h 2 min left"
    assert sheet.lines(status)["saved"] == "step 60, 30 s ago"


def test_steps_that_are_done_again_are_not_done_yet(run, squeue):
    """The ledger keeps the furthest step that was ever done."""
    run.report(60, ago=500.0)
    run.ledger(64, ago=400.0)
    run.start(step=60, lost=4, ago=100.0)
    assert run.status.step == 60
    run.ledger(64, ago=50.0)
    assert run.status.step == 64


@pytest.mark.parametrize(
    ("line", "state", "why"),
    [
        (
            "7|7|PENDING|Resources|1:00|2027-01-01T10:00:00",
            "waiting",
            "Resources, expected 2027-01-01T10:00:00",
        ),
        ("7|7|PENDING|Dependency|1:00|N/A", "waiting", "Dependency"),
        ("7|7|COMPLETING|None|1:00|N/A", "running", "1:00 to its limit"),
        ("7|7|SUSPENDED|None|1:00|N/A", "waiting", "SUSPENDED"),
        ("7|7|CANCELLED|None|1:00|N/A", "stopped", "job 7 is CANCELLED"),
        ("9|9|RUNNING|None|1:00|N/A", "stopped", "Slurm knows its job no more"),
    ],
)
def test_what_slurm_says(run, squeue, tmp_path, line, state, why):
    run.start(ago=20.0)
    run.submitted("7")
    squeue(line)
    assert (run.status.state, run.status.why) == (state, why)
    assert "--jobs=7" in (tmp_path / "asked").read_text()


def test_a_job_that_slurm_has_forgotten_is_not_a_slurm_that_is_silent(run, squeue):
    run.start(ago=20.0)
    run.submitted("7")
    assert (run.status.state, run.status.why) == ("running", "no Slurm answers here")
    squeue(code=1, error="slurm_load_jobs error: Invalid job id specified")
    assert run.status.state == "stopped"


@pytest.mark.parametrize("path", ["", None])
def test_without_a_slurm_that_answers_its_files_tell(run, squeue, monkeypatch, path):
    """Neither where its commands are missing nor where they reach nobody."""
    if path is not None:
        monkeypatch.setenv("PATH", path)
    run.submitted("7")
    assert (run.status.state, run.status.why) == ("silent", "not begun; no Slurm answers here")
    run.start(ago=601.0)
    assert run.status.why == "no step for ten minutes; no Slurm answers here"
    run.ledger(5, ago=10.0)
    assert (run.status.state, run.status.why) == ("running", "no Slurm answers here")


def test_an_element_of_an_array_and_the_job_of_a_batch_script(run, squeue):
    run.submitted("12_1")
    squeue("12_0|12|RUNNING|None|1:00|N/A", "12_1|14|PENDING|Priority|1:00|N/A")
    assert (run.status.state, run.status.jobs) == ("waiting", ("12_1",))
    run.event("start", job="14")
    assert run.status.jobs == ("12_1",)
    run.event("start", job="30")
    squeue("30|30|RUNNING|None|1:00|N/A")
    assert (run.status.state, run.status.jobs) == ("running", ("30",))


def test_how_it_ended(run, squeue):
    run.event("start", ago=100.0)
    run.event("end", ago=90.0, code=1, reason="rank 3: out of memory")
    run.event("restart", ago=90.0)
    run.start(ago=80.0)
    status = run.status
    assert (status.state, status.error, status.error_age) == (
        "running",
        "code 1: rank 3: out of memory",
        90.0,
    )
    run.event("end", ago=50.0, code=75, reason="SIGUSR2 asked to stop")
    assert (run.status.state, run.status.why) == ("interrupted", "SIGUSR2 asked to stop")
    assert run.status.error_age == 90.0
    run.event("end", ago=9.0, code=2, reason="the disk is full")
    assert (run.status.state, run.status.error) == ("failed", "code 2: the disk is full")
    run.event("give up", ago=8.0, reason="again")
    assert run.status.state == "failed"


def test_stages_that_are_finished(run, squeue):
    for step in range(10, 101, 10):
        run.report(step)
    run.report(100, ago=200.0, finished=1.0)
    assert run.status.stage == "two"
    run.event("end", code=0)
    assert (run.status.state, run.status.why) == ("stopped", "finished so far: one")
    for step in range(110, 151, 5):
        run.report(step, **{"perf/seconds_left": 3.0})
    run.report(150, finished=1.0)
    status = run.status
    assert (status.state, status.stage, status.step, status.seconds_left) == ("finished", "two", 150, None)


def test_a_stage_that_ended_by_itself_is_no_run_that_goes_on(run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    run.start(ago=300.0)
    run.report(100, ago=200.0, finished=1.0)
    run.ledger(100, ago=30.0)
    assert run.status.state == "running"
    run.ledger(100, ago=90.0)
    assert (run.status.state, run.status.why) == ("stopped", "finished so far: one")


def test_without_slurm_and_supervisor_steps_tell(run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    run.start(ago=30.0)
    run.submitted("7")
    assert run.status.state == "running"
    run.ledger(5, ago=10.0)
    assert run.status.state == "running"
    (run.root / "starts.jsonl").unlink()
    run.ledger(5, ago=601.0)
    assert run.status.why == "no step for ten minutes; no Slurm answers here"


def test_a_process_of_this_machine(run, monkeypatch):
    run.submitted(str(os.getpid()), executor="local", host=os.uname().nodename)
    assert run.status.jobs == ()  # it is alive, and no job
    command = "import time; time.sleep(60)  # submitit"
    with subprocess.Popen([sys.executable, "-c", command]) as process:
        while b"submitit" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            time.sleep(0.01)  # not yet what it will be
        run.submitted(str(process.pid), executor="local", host=os.uname().nodename)
        assert (run.status.state, run.status.why) == ("waiting", f"for its turn in process {process.pid}")
        run.event("start", ago=-1.0, job="")
        assert (run.status.state, run.status.why) == ("running", "on this machine")
        run.event("end", ago=-2.0, job="", code=1, reason="out of memory")
        assert (run.status.state, run.status.why) == ("failed", "out of memory")
        run.event("restart", ago=-2.0, job="")
        assert run.status.state == "running"
        run.event("end", ago=-3.0, job="", code=0)
        assert run.status.state == "stopped"
        run.submitted(str(process.pid), executor="local", host=os.uname().nodename)
        assert run.status.state == "waiting"  # another stage of it follows in the same process
        run.submitted(str(process.pid), executor="local", host="elsewhere")
        assert run.status.jobs == ()
        process.kill()


def test_torn_and_missing_files(run, squeue, tmp_path, capsys):
    (run.root / "metrics.jsonl").write_text('{"step": 10, "time": 5}\n{"step": 2')
    (run.root / "ledger").write_text("")
    (run.root / "checkpoints" / "step-00000010.tmp-x").mkdir(parents=True)
    status = run.status
    assert (status.step, status.checkpoint, status.samples_per_second) == (10, None, None)

    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "is no run directory: it has no run.yaml" in said.err
    other = Directory(tmp_path / "other")
    (other.root / "run.yaml").write_text("stages: 3")
    assert main([str(tmp_path / "gone"), str(run.root), str(other.root)]) == 2
    said = capsys.readouterr()
    assert said.out.startswith(f"run       {run.root}\n")
    assert said.err.splitlines() == [
        f"error: {tmp_path / 'gone'} is no run directory: it does not exist",
        f"error: {other.root}/run.yaml cannot be read as a run: name the directory of one",
    ]


@pytest.mark.parametrize(
    ("alone", "stage", "said"),
    [
        (True, "one", "5 samples/s, 2 h 2 min left of stage one"),
        (False, "one", "5 samples/s, 2 h 2 min left"),
        (True, "two", "5 samples/s, 2 h 2 min left"),
    ],
)
def test_of_what_the_time_is_left(run, squeue, alone, stage, said):
    run.start(stage=stage, alone=alone)
    run.report(60, **{"perf/samples_per_second": 5.0, "perf/seconds_left": 7320.0})
    assert sheet.lines(run.status)["speed"] == said


def test_of_a_stage_that_is_finished_none_is_left(run, squeue):
    run.start(alone=True)
    for step in range(91, 101):
        run.report(step, **{"perf/samples_per_second": 5.0, "perf/seconds_left": 0.0})
    assert run.status.seconds_left == 0.0
    run.report(100, finished=1.0)
    assert sheet.lines(run.status)["speed"] == "5 samples/s"


def test_what_is_printed(run, squeue, tmp_path, capsys):
    run.start(ago=7200.0)
    run.report(60, **{"perf/samples_per_second": 5234.6, "perf/seconds_left": 300_000.0})
    other = Directory(tmp_path / "other")
    other.submitted("8_0")
    squeue("8_0|8|PENDING|Priority|1:00|N/A")
    assert main([str(run.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples_per_second"] == 5234.6
    assert main([str(run.root), str(other.root)]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.split() == [
        "run", "state", "stage", "step", "samples/s", "left", "restarts", "lost", "saved", "last", "error",
    ]  # fmt: skip
    assert "one    60 of 150  5,235" in second
    assert "3 d 11 h" in second
    assert "waiting (Priority)" in third


def test_a_sweep_is_named_by_the_directory_of_its_runs(squeue, tmp_path):
    (tmp_path / "sweep" / "code").mkdir(parents=True)
    runs = [Directory(tmp_path / "sweep" / name).root for name in ("seed=0", "seed=1")]
    assert [Path(each.run) for each in statuses([tmp_path / "sweep"], now=NOW)] == runs
    assert [Path(each.run) for each in statuses(sorted(tmp_path.glob("sweep/*")), now=NOW)] == runs


def test_it_is_there_at_once(run):
    code = f"import sys, slurm.status as s; s.main([{str(run.root)!r}]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=300)
