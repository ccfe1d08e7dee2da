"""The process beside training, started and ended as training does it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datasets.errors import UserError
from pretrain.rundir import RunDir
from pretrain.sinks import mirrored
from pretrain.sinks.jsonl import JsonLines
from pretrain.sinks.mirrored import Mirrored, Wandb

pytestmark = pytest.mark.usefixtures("logged_out")
RUN_YAML = "data: scenes\nwandb: {mode: offline}\n"


@pytest.fixture(autouse=True)
def _patience():
    """The end waits for a mirror on a busy machine, where it takes long to begin; also after an `undo`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirrored, "PATIENCE", 300.0)
        yield


@pytest.fixture
def rundir(tmp_path):
    (tmp_path / "run").mkdir()
    rundir = RunDir(tmp_path / "run")
    rundir.run_yaml.write_text(RUN_YAML)
    return rundir


def report(rundir, *steps, after=0):
    lines = JsonLines(rundir.metrics, after=after)
    for step in steps:
        lines.step(step, {"samples": step * 8, "train/loss": 1 / step})
    lines.close()


def offline_steps(rundir):
    """Steps of the one offline run that W&B would find."""
    (folder,) = rundir.wandb.glob("offline-run-*")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", str(folder), "--json"]
    said = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    return [int(step) for step in re.findall(r'"step":\{"num":(\d+)\}', said)]


def until(happened, *, seconds=300):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def process_of(mirror):
    assert mirror._process is not None
    return mirror._process


def test_training_hears_what_the_mirror_says_and_when_it_closes_all_is_there(rundir):
    said = []
    mirror = Mirrored(rundir, say=said.append)
    report(rundir, 2, 4)
    until(lambda: mirror.step(4, {}) or said)
    report(rundir, 6, after=4)
    mirror.close()
    assert len(said) == 1
    assert re.fullmatch(r"W&B: offline \(as asked\): \S+/offline-run-\S+; `python -m .* uploads it", said[0])
    assert offline_steps(rundir) == [2, 4, 6]
    process_of(mirror).wait(300)


def runs(pid: int) -> bool:
    """Whether a process is there and more than a zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_killed_in_turns_nothing_is_lost(rundir):
    """The mirror with kill -9, then training with it, then a clean end."""
    said = []
    first = Mirrored(rundir, say=said.append)
    report(rundir, 2)
    until(lambda: first.step(2, {}) or said)
    process_of(first).kill()
    until(lambda: first.step(2, {}) or len(said) > 1)
    report(rundir, 4, after=2)
    first.step(4, {})
    first.close()
    assert len(said) == 2, "said once"
    assert "the mirror ended with code -9" in said[1]

    read, write = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        second = Mirrored(rundir, say=lambda text: None)
        os.write(write, str(process_of(second).pid).encode())
        signal.pause()
    pid = int(os.read(read, 20))
    report(rundir, 6, 8, after=4)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)

    third = Mirrored(rundir, say=said.append)  # waits for the second, which has seen its trainer die
    report(rundir, 8, 10, after=6)
    third.close()
    process_of(third).wait(300)
    until(lambda: not runs(pid))
    assert offline_steps(rundir) == [2, 4, 6, 8, 10]


def test_a_signal_to_the_whole_job_reaches_training_only(rundir):
    """Slurm's, for one: the mirror passes over it, and W&B's own process, which does not, is begun anew."""
    said = []
    mirror = Mirrored(rundir, say=said.append)
    report(rundir, 2, 4, 6)
    until(lambda: mirror.step(6, {}) or said)
    children = subprocess.run(["pgrep", "-P", str(process_of(mirror).pid)], capture_output=True, text=True)
    for pid in (process_of(mirror).pid, *map(int, children.stdout.split())):
        os.kill(pid, signal.SIGTERM)
    report(rundir, 8, after=6)
    mirror.close()
    assert process_of(mirror).wait(300) == 0
    assert list((rundir.wandb / "superseded").iterdir()), "it was begun anew"
    assert offline_steps(rundir) == [2, 4, 6, 8]


def test_an_unreachable_server_is_never_waited_for(rundir, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    rundir.run_yaml.write_text("data: scenes\n")
    said = []
    waits = []
    monkeypatch.setattr(mirrored.select, "select", lambda *_: waits.append("select") or ([], [], []))
    monkeypatch.setattr(subprocess.Popen, "wait", lambda *_, **__: waits.append("wait"))
    mirror = Mirrored(rundir, say=said.append)
    for step in range(1, 1000):
        mirror.step(step, {})
    assert (waits, said) == ([], [])
    monkeypatch.undo()
    report(rundir, 2)
    mirror.close()
    assert "W&B: offline (http://127.0.0.1:9 does not answer)" in said[0]
    assert offline_steps(rundir) == [2]


def test_a_malformed_key_costs_training_no_copy(rundir, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    rundir.run_yaml.write_text("data: scenes\nwandb: {mode: online}\n")
    said = []
    mirror = Mirrored(rundir, say=said.append)
    report(rundir, 2)
    mirror.close()
    assert len(said) == 1
    assert "W&B: offline (W&B refuses its settings, WANDB_API_KEY invalid" in said[0]
    assert offline_steps(rundir) == [2]


def test_a_mirror_that_fails_after_its_last_word_is_told_of(rundir, tmp_path, monkeypatch):
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\ncat\nexec >&-\nsleep 0.2\nexit 3\n")
    failing.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(failing))
    monkeypatch.setattr(mirrored, "_LAST_MOMENT", 60.0)
    said = []
    Mirrored(rundir, say=said.append).close()
    assert said == [f"W&B: the mirror ended with code 3, see {rundir.wandb / 'mirror.log'}; training goes on"]


def test_a_mirror_that_has_nothing_more_to_say_is_not_waited_for(rundir, tmp_path, monkeypatch):
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec >&-\nexec sleep 600\n")
    silent.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(silent))
    said, waits = [], []
    mirror = Mirrored(rundir, say=said.append)
    until(lambda: not mirror._relay())
    wait = subprocess.Popen.wait
    monkeypatch.setattr(
        subprocess.Popen, "wait", lambda self, timeout=None: waits.append(timeout) or wait(self, 0)
    )
    for step in range(100):
        mirror.step(step, {})
    assert waits == [], "training never waits"
    mirror.close()
    assert waits == [1.0]
    assert said == []
    monkeypatch.undo()
    process_of(mirror).kill()
    process_of(mirror).wait(300)


def test_a_mirror_that_cannot_be_started_is_a_sentence(rundir, monkeypatch):
    said = []
    rundir.wandb.write_text("a file")
    sink = Mirrored(rundir, say=said.append)
    sink.step(2, {})
    sink.close()
    assert len(said) == 1
    assert re.fullmatch(r"W&B: not mirrored \(.*File exists.*\); training goes on", said[0])


def test_the_end_does_not_wait_for_ever(rundir, tmp_path, monkeypatch):
    """For a mirror that begins when there is nothing more to come."""
    late = tmp_path / "late"
    late.write_text(f'#!/bin/sh\ncat > /dev/null\nexec {sys.executable} "$@"\n')
    late.chmod(0o700)
    said = []
    monkeypatch.setattr(mirrored, "PATIENCE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(late))
        mirror = Mirrored(rundir, say=said.append)
    mirror.close()
    assert said == [f"W&B: still uploading, in the background; see {rundir.wandb / 'mirror.log'}"]
    process_of(mirror).wait(300)
    assert offline_steps(rundir) == []


@pytest.mark.parametrize(
    ("flag", "environment", "wanted"),
    [
        ("auto", None, "auto"),
        ("auto", "", "auto"),
        ("auto", "dryrun", "offline"),
        ("auto", "disabled", "disabled"),
        ("online", "disabled", "online"),
        ("disabled", "online", "disabled"),
    ],
)
def test_a_flag_wins_over_the_environment(flag, environment, wanted, monkeypatch):
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert Wandb(mode=flag).wanted() == wanted


def test_a_mode_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "on")
    with pytest.raises(UserError, match="WANDB_MODE is 'on': set it to online"):
        Wandb().wanted()


def test_the_client_is_not_imported_for_training():
    code = "import sys, pretrain.sinks.mirrored; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
