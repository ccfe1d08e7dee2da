"""What is submitted runs in a real Slurm, comes back after a requeue, and is the code that was submitted."""

import json
import shutil
import time
from pathlib import Path

import pytest

import slurm.submit
from slurm import jobs, testing
from slurm.status import statuses
from slurm.submit import main

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

ROOT = Path(__file__).resolve().parent.parent.parent
HELD_SMALL = Path(__file__).with_name("held_small.py")
CPUS = ["--gpus", "0", "--time", "1:00"]
TINY = ["--recipe", "laptop", "--stages.one.batch", "8"]

STANDIN = """
import json, os, pathlib, sys, time
from pretrain import verdict

given = sys.argv[1:]
out = pathlib.Path(given[-1])
began = os.environ["SLURM_JOB_ID"] + "-" + os.environ.get("SLURM_RESTART_COUNT", "0")
mine = {name: value for name, value in os.environ.items() if name.startswith("SLURM_")}
record = {"arguments": given, "environment": mine, "code": __file__, "time": time.time()}
(out / f"seen-{began}-{mine['SLURM_PROCID']}.json").write_text(json.dumps(record))
time.sleep(1)
if "SLURM_RESTART_COUNT" not in os.environ:
    verdict.give(verdict.Verdict(code=75, reason="asked to stop"))
    sys.exit(75)
"""
"""In place of pretrain/launch.py: interrupted the first time, and then done."""


@pytest.fixture
def standin(tmp_path, monkeypatch, cluster):
    root = tmp_path / "repository"
    for package in ("datasets", "objectives", "pretrain", "slurm"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pretrain" / "launch.py").write_text(STANDIN)
    monkeypatch.setattr(slurm.submit, "_ROOT", root)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return root


def submitted(cluster: testing.Cluster, out: Path) -> list[testing.Job]:
    return [testing.Job(cluster, int(each.job)) for each in jobs.read(out)]


def state(out: Path) -> str:
    (found,) = statuses([out], now=time.time())
    return found.state


def test_a_requeued_job_runs_what_was_submitted_and_the_next_waits_for_it(cluster, standin, tmp_path):
    out = tmp_path / "run"
    command = [*CPUS, "--nodes", "2", "--", *TINY, "--seed", "3", "--out", str(out)]
    assert main(command) == 0
    (standin / "pretrain" / "launch.py").write_text(
        "print('edited since', flush=True)\nraise SystemExit(2)\n"
    )
    assert main(command) == 0
    first, second = submitted(cluster, out)
    assert second.show()["Dependency"] == "singleton(unfulfilled)"
    first.wait("COMPLETED", seconds=600)
    assert first.restarts == 1
    second.wait("FAILED", seconds=600)
    assert "edited since" in second.output

    found = [json.loads(path.read_text()) for path in out.glob("seen-*.json")]
    mine = [each["environment"] for each in found]
    places = sorted((each.get("SLURM_RESTART_COUNT", "0"), each["SLURM_PROCID"]) for each in mine)
    assert places == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert {(each["SLURM_PROCID"], each["SLURM_NODEID"]) for each in mine} == {("0", "0"), ("1", "1")}
    assert {(each["SLURM_JOB_ID"], each["SLURM_NTASKS"], each["SLURM_NNODES"]) for each in mine} == {
        (str(first.id), "2", "2")
    }
    code = {each["code"] for each in found}
    assert len(code) == 1
    assert str(out / "code") in code.pop()
    events = [json.loads(line) for line in (out / "attempts.jsonl").read_text().splitlines()]
    assert [(each["event"], each["code"]) for each in events if each["job"] == str(first.id)] == [
        ("start", None), ("end", 75), ("requeue", None), ("start", None), ("end", 0),
    ]  # fmt: skip
    began = [each["time"] for each in events if each["job"] == str(second.id)]
    assert min(began) > max(each["time"] for each in events if each["job"] == str(first.id))


def test_an_array_trains_each_in_its_own_directory(cluster, standin, tmp_path):
    top = tmp_path / "sweep"
    assert main([*CPUS, "--sweep", "seed=3,4", "--", *TINY, "--out", str(top)]) == 0
    runs = [top / "seed=3", top / "seed=4"]
    cluster.wait_for(lambda: {state(out) for out in runs} == {"stopped"}, "both runs to end", seconds=600)
    for number, out in enumerate(runs):
        (job,) = jobs.read(out)
        assert job.job.endswith(f"_{number}")
        found = [json.loads(path.read_text()) for path in out.glob("seen-*.json")]
        # Requeued once, by itself: the number of one of the elements is also that of the whole array.
        assert sorted(each["environment"].get("SLURM_RESTART_COUNT", "0") for each in found) == ["0", "1"]
        events = [json.loads(line) for line in (out / "attempts.jsonl").read_text().splitlines()]
        assert [each["job"] for each in events if each["event"] == "requeue"] == [job.job]
        for each in found:
            assert each["arguments"][-4:] == ["--seed", str(3 + number), "--out", str(out)]
            assert each["environment"]["SLURM_ARRAY_TASK_ID"] == str(number)
        assert "in the queue again" in Path(job.log).read_text()


def test_two_stages_in_two_jobs_and_a_warning_in_between(cluster, tmp_path, monkeypatch):
    """Both are submitted at once; the first is warned, saves, comes back, and only then comes the other."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    held = tmp_path / "held"
    held.touch()
    monkeypatch.setenv("HELD", str(held))
    out = tmp_path / "run"
    given = [
        *("--recipe", str(HELD_SMALL), "--stage", "one", "--out", str(out), "--cadence.report", "2"),
        *("--stages.one.steps", "40", "--stages.one.batch", "16", "--stages.two.batch", "16"),
        *("--stages.two.steps", "8", "--stages.two.resolution", "64", "--stages.two.micro-batches", "1"),
        *("--watchdog.least", "600"),
    ]
    assert main([*CPUS, "--nodes", "2", "--then", "two", "--", *given]) == 0
    one, two = submitted(cluster, out)
    cluster.wait_for(lambda: statuses([out], now=time.time())[0].step >= 2, "the first steps", seconds=600)
    (status,) = statuses([out], now=time.time())
    assert (status.state, status.stage, status.jobs) == ("running", "one", (str(one.id), str(two.id)))
    one.signal("USR2")
    cluster.wait_for(lambda: one.restarts == 1, "the requeue")
    held.unlink()
    assert two.state == "PENDING"
    one.wait("COMPLETED", seconds=600)
    two.wait("COMPLETED", seconds=600)
    (status,) = statuses([out], now=time.time())
    assert (status.state, status.step, status.restarts, status.lost_steps) == ("finished", 48, 1, 0)
    assert [int(line.split()[0]) for line in (out / "ledger").read_text().splitlines()] == [*range(1, 49)]
