"""What a launcher may rely on, with real processes: two ranks as srun or torchrun start them, supervised.

Faults come from outside: signals to a rank, while the run is held up. The scheduler is a fake that obeys.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from datasets.atomic import replace
from pretrain.attempts import Event, read_attempts
from pretrain.starts import read_starts
from pretrain.supervise import newest_step

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FAKES = Path(__file__).resolve().parent / "fakes"
PATIENCE = 900.0
"""Seconds within which whatever must come comes, on any machine."""
STEPS = 40
FLAGS = (
    f"--objectives itc,lm --stages.one.steps {STEPS} --stages.one.batch 32 --stages.one.resolution 16 "
    "--stages.one.optim.kind adamw --stages.one.optim.warmup 2 --vocabulary 300 --model.embed 16 "
    "--model.text.width 16 --model.text.layers 1 --model.captioner.width 16 --model.captioner.layers 1 "
    "--cadence.report 1 --cadence.checkpoint 10 --precision.threads 1 --wandb.mode disabled"
)
HELD_UP = Path(__file__).with_name("held.py")
SRUN = "srun --kill-on-bad-exit=1 python -m pretrain.launch"
TORCHRUN = "python -m torch.distributed.run --standalone --nproc-per-node 2 -m pretrain.launch"


class Run:
    """A supervised run on two ranks, which is held up where `held.py` says."""

    def __init__(self, folder: Path, flags: str, *, by: str = SRUN, held: str = "", **more: str) -> None:
        self.out, self.slurm, self._held = (folder / name for name in ("run", "slurm", "held"))
        for each in (self.slurm, self._held):
            each.mkdir(exist_ok=True, parents=True)
        if held:
            self.hold(held)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment = {
            **clean,
            "PATH": f"{FAKES}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "FAKE_SLURM": str(self.slurm),
            "FAKE_TASKS": "1,1",
            "HELD": str(self._held),
            **({"SLURM_JOB_ID": "7", "FAKE_KILLS": "1"} if by == SRUN else {}),
            **more,
        }
        training = f"{by} --recipe {HELD_UP} {FLAGS} {flags} --out {self.out}"
        command = f"{sys.executable} -m pretrain.supervise -- {training}".split()
        with (folder / "said").open("ab") as said:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
        self._said = folder / "said"
        self.pid = self._process.pid
        (self.slurm / "supervisor").write_text(str(self.pid))

    @property
    def said(self) -> str:
        return self._said.read_text()

    def ended(self) -> int:
        """Its exit code."""
        return self._process.wait(timeout=PATIENCE)

    def wait_for(self, happened: Callable[[], object]) -> None:
        """Wait until something has happened, before this ends."""
        end = time.monotonic() + PATIENCE
        goes_on = self.goes_on
        while not happened():
            assert goes_on, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.005)
            goes_on = self.goes_on  # before it is looked what has happened

    def at_step(self, step: int) -> None:
        """Wait for a step in the ledger."""
        ledger = self.out / "ledger"
        self.wait_for(lambda: ledger.exists() and ledger.read_text().count("\n") >= step)

    def hold(self, what: str) -> None:
        """Hold it up from now on."""
        (self._held / what).touch()

    def at_hold(self) -> None:
        """Wait until its steps are held up: 15 are done, and 10 are saved."""
        self.at_step(15)
        self.wait_for(lambda: newest_step(self.out) >= 10)

    def release(self, what: str = "steps") -> None:
        """It is no longer held up."""
        (self._held / what).unlink()

    def task(self, rank: int) -> int:
        """The process of a rank, once it is there."""
        file = self.slurm / f"task-{rank}"
        while not (file.exists() and file.read_text()):
            time.sleep(0.01)
        return int(file.read_text())

    def signal(self, number: int, ranks: tuple[int, ...] = (0, 1)) -> None:
        """What Slurm does: to tasks, not to srun."""
        for rank in ranks:
            os.kill(self.task(rank), number)

    @property
    def goes_on(self) -> bool:
        return self._process.poll() is None

    @property
    def requeued(self) -> int:
        calls = self.slurm / "calls"
        return calls.read_text().count("requeue") if calls.exists() else 0

    @property
    def ends(self) -> list[Event]:
        return [each for each in read_attempts(self.out) if each.event == "end"]

    @property
    def lost(self) -> list[int]:
        return [start.lost for start in read_starts(self.out / "starts.jsonl")]

    @property
    def ledger(self) -> bytes:
        return (self.out / "ledger").read_bytes()


@pytest.fixture(scope="module")
def flags(write_corpus, tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("contract") / "corpus")


@pytest.fixture(scope="module")
def oracle(flags, tmp_path_factory) -> bytes:
    """The ledger of two ranks that nothing interrupted, started by torchrun."""
    run = Run(tmp_path_factory.mktemp("oracle"), flags, by=TORCHRUN)
    assert run.ended() == 0, run.said
    return run.ledger


def test_a_rank_that_is_killed_is_started_again_with_the_others_in_place(oracle, flags, tmp_path):
    run = Run(tmp_path, flags, held="steps")
    run.at_hold()
    run.signal(signal.SIGKILL, ranks=(1,))
    run.release()
    assert run.ended() == 0, run.said
    assert run.ledger == oracle
    assert [end.code for end in run.ends][1:] == [0]
    assert len(run.lost) == 2
    assert run.lost[1] <= 10 + 1
    assert run.requeued == 0


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_requeues_once(oracle, flags, tmp_path):
    run = Run(tmp_path, flags, held="steps")
    run.at_hold()
    run.signal(signal.SIGUSR2, ranks=(1,))
    run.release()
    assert run.ended() == 75, run.said
    assert run.requeued == 1
    assert [(end.code, end.reason) for end in run.ends] == [(75, run.ends[0].reason)]
    assert "asked to stop" in run.ends[0].reason
    again = Run(tmp_path, flags, SLURM_RESTART_COUNT="1")
    assert again.ended() == 0, again.said
    assert again.ledger == oracle
    assert again.lost == [0, 0]


def test_a_signal_while_torch_is_imported_loses_nothing(oracle, flags, tmp_path):
    """And one in the last steps, or after them, leaves a finished run finished."""
    run = Run(tmp_path, flags, held="start")
    pids = [run.task(rank) for rank in (0, 1)]
    for pid in pids:  # a handler is there as soon as Python runs our first line
        run.wait_for(lambda pid=pid: _catches(pid, signal.SIGTERM))
    run.signal(signal.SIGTERM)
    run.release("start")
    assert run.ended() == 75, run.said
    assert run.requeued == 1
    assert not (run.out / "checkpoints").exists()
    run = Run(tmp_path, flags, SLURM_RESTART_COUNT="1")
    run.at_step(STEPS)
    while run.goes_on:  # also in the last save, and while the interpreter ends
        for rank in (0, 1):
            with suppress(ProcessLookupError):
                os.kill(run.task(rank), signal.SIGTERM)
        time.sleep(0.02)
    assert run.ended() == 0, run.said
    assert run.ledger == oracle
    assert run.requeued == 1, "a finished run is not requeued"


def test_a_last_save_that_outlives_the_limit_costs_the_steps_since_the_one_before(oracle, flags, tmp_path):
    """The job is requeued while there is still somebody to do it, and then all of it is killed."""
    (tmp_path / "slurm").mkdir()
    left = tmp_path / "slurm" / "left"
    left.write_text("0:18")
    run = Run(tmp_path, flags, held="steps")
    run.at_hold()
    run.hold("disk")
    run.signal(signal.SIGUSR2)
    run.release()
    run.wait_for(lambda: list(run.out.glob("checkpoints/*.tmp-*")))
    replace(left, b"0:14")
    run.wait_for(lambda: run.requeued)
    for pid in (run.pid, run.task(0), run.task(1)):
        with suppress(ProcessLookupError):  # srun ends the other one
            os.kill(pid, signal.SIGKILL)
    run.ended()
    done, saved = run.ledger.count(b"\n"), newest_step(run.out)
    run.release("disk")
    left.unlink()
    assert f"unless that ends in time, what was trained after step {saved} is done again" in run.said
    again = Run(tmp_path, flags, SLURM_RESTART_COUNT="1")
    assert again.ended() == 0, again.said
    assert again.ledger == oracle
    assert again.lost == [0, done - saved]
    assert done > saved
    assert again.requeued == 1


def _catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_rank_that_is_stopped_is_named_and_the_run_goes_on_without_a_hand(oracle, flags, tmp_path):
    run = Run(tmp_path, f"{flags} --watchdog.least 20", held="steps", FAKE_KILL_WAIT="2")
    run.at_hold()
    run.signal(signal.SIGSTOP, ranks=(1,))
    run.release()
    assert run.ended() == 0, run.said
    assert run.ledger == oracle
    assert [end.code for end in run.ends] == [70, 0]
    assert "the run hangs" in run.ends[0].reason
    assert "rank 1 on nowhere1 (no sign of life for" in run.ends[0].reason
    assert "pretrain/loop.py" in (run.out / "stacks" / "rank-0.txt").read_text()
    assert not (run.out / "stacks" / "rank-1.txt").exists(), "it does not answer"


def test_building_that_does_not_end_ends_the_run(flags, tmp_path):
    out, held = tmp_path / "run", tmp_path / "held"
    held.mkdir()
    (held / "building").touch()
    short = "--watchdog.least 2 --watchdog.most 2"
    training = f"pretrain.launch --recipe {HELD_UP} {FLAGS} {flags} {short} --out {out}"
    ended = subprocess.run(
        [sys.executable, "-m", *training.split()], cwd=ROOT, env={**os.environ, "HELD": str(held)},
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert ended.returncode == 70
    assert re.search(
        r"rank 0: the run hangs \(building for \d+ s, longer than --watchdog.most\)", ended.stderr
    )
    assert "pretrain/prepare.py" in (out / "stacks" / "rank-0.txt").read_text()


def test_a_run_that_is_stopped_as_a_whole_and_continued_goes_on(oracle, flags, tmp_path):
    run = Run(tmp_path, f"{flags} --watchdog.least 20", held="steps")
    run.at_hold()
    run.signal(signal.SIGSTOP)
    run.release()
    time.sleep(24)
    run.signal(signal.SIGCONT)
    assert run.ended() == 0, run.said
    assert run.ledger == oracle
    assert len(run.ends) == 1


def test_what_is_wrong_on_one_rank_ends_all_and_is_the_reason(flags, tmp_path):
    """The other one would wait for it for hours, and is not to speak of lost connections."""
    wrong = {"FAKE_RANK": "1", "FAKE_RANK_SETS": "MEDLEY_RENDEZVOUS_SECONDS=soon"}
    run = Run(tmp_path, flags, MEDLEY_RENDEZVOUS_SECONDS="9000", **wrong)
    assert run.ended() == 2, run.said
    (end,) = run.ends
    assert end.code == 2
    assert end.reason.startswith("rank 1: MEDLEY_RENDEZVOUS_SECONDS is 'soon'")
    assert run.said.count("error: MEDLEY") == 1
    assert run.requeued == 0


def test_under_torchrun_the_codes_are_the_same(oracle, flags, tmp_path):
    """Which itself knows only 0 and 1."""
    run = Run(tmp_path, f"{flags} --seed x", by=TORCHRUN)
    assert run.ended() == 2, run.said
    (tmp_path / "said").write_text("")
    run = Run(tmp_path, flags, by=TORCHRUN, held="steps")
    run.at_hold()
    os.kill(run.pid, signal.SIGTERM)
    assert run.ended() == 75, run.said
    run.release()
    run = Run(tmp_path, flags, by=TORCHRUN)
    assert run.ended() == 0, run.said
    assert run.ledger == oracle
    assert run.lost == [0, 0]


def test_a_zombie_of_an_earlier_start_writes_nothing_more(oracle, flags, tmp_path):
    """Its supervisor and its node are thought lost; the job runs again, and then it wakes up."""
    zombie = Run(tmp_path, flags, held="steps")
    zombie.at_hold()
    zombie.signal(signal.SIGSTOP)
    zombie.release()
    ranks = [zombie.task(rank) for rank in (0, 1)]
    run = Run(tmp_path, flags, SLURM_RESTART_COUNT="1")
    run.wait_for(lambda: len(run.lost) == 2)
    run.at_step(20)
    before = {path: path.read_bytes() for path in run.out.glob("checkpoints/*/manifest.json")}
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    assert zombie.ended() == 1, zombie.said
    assert run.ended() == 0, run.said
    assert run.ledger == oracle
    assert "is of an earlier start and leaves without writing in it" in run.said
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists())
    starts = [json.loads(line) for line in (run.out / "attempts.jsonl").read_text().splitlines()]
    assert [(each["event"], each["restart"]) for each in starts] == [("start", 0), ("start", 1), ("end", 1)]
