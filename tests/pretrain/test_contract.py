"""What a launcher may rely on, with real processes: two ranks as srun or torchrun start them, supervised.

Faults come from outside: signals to a rank, once the ledger shows a step. The scheduler is a fake that obeys.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pretrain.attempts import Event, read_attempts
from pretrain.starts import read_starts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FAKES = Path(__file__).resolve().parent / "fakes"
STEPS = 40
FLAGS = (
    f"--objectives itc,lm --stages.one.steps {STEPS} --stages.one.batch 32 --stages.one.resolution 16 "
    "--stages.one.optim.kind adamw --stages.one.optim.warmup 2 --vocabulary 300 --model.embed 16 "
    "--model.text.width 16 --model.text.layers 1 --model.captioner.width 16 --model.captioner.layers 1 "
    "--cadence.report 1 --cadence.checkpoint 10 --precision.threads 1 --wandb.mode disabled"
)
SLOW_DISK = Path(__file__).with_name("slow_disk.py")
SRUN = "srun --kill-on-bad-exit=1 python -m pretrain.launch"
TORCHRUN = "python -m torch.distributed.run --standalone --nproc-per-node 2 -m pretrain.launch"


class Run:
    """A supervised run on two ranks."""

    def __init__(self, folder: Path, flags: str, *, by: str = SRUN, **more: str) -> None:
        folder.mkdir(exist_ok=True)
        self.out, self.slurm = folder / "run", folder / "slurm"
        self.slurm.mkdir(exist_ok=True)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment = {
            **clean,
            "PATH": f"{FAKES}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "FAKE_SLURM": str(self.slurm),
            "FAKE_TASKS": "1,1",
            **({"SLURM_JOB_ID": "7", "FAKE_KILLS": "1"} if by == SRUN else {}),
            **more,
        }
        command = f"{sys.executable} -m pretrain.supervise -- {by} {FLAGS} {flags} --out {self.out}".split()
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
        return self._process.wait(timeout=400)

    def at_step(self, step: int) -> None:
        """Wait for a step in the ledger."""
        ledger = self.out / "ledger"
        while not (ledger.exists() and ledger.read_text().count("\n") >= step):
            assert self._process.poll() is None, self.said
            time.sleep(0.005)

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
    run = Run(tmp_path, flags)
    run.at_step(15)
    run.signal(signal.SIGKILL, ranks=(1,))
    assert run.ended() == 0, run.said
    assert run.ledger == oracle
    assert [end.code for end in run.ends][1:] == [0]
    assert len(run.lost) == 2
    assert run.lost[1] <= 10 + 1
    assert run.requeued == 0


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_requeues_once(oracle, flags, tmp_path):
    run = Run(tmp_path, flags)
    run.at_step(15)
    run.signal(signal.SIGUSR2, ranks=(1,))
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
    run = Run(tmp_path, flags)
    pids = [run.task(rank) for rank in (0, 1)]
    for pid in pids:  # a handler is there as soon as Python runs our first line
        while not _catches(pid, signal.SIGTERM):
            time.sleep(0.005)
    run.signal(signal.SIGTERM)
    assert run.ended() == 75, run.said
    assert run.requeued == 1
    assert not (run.out / "checkpoints").exists()
    run = Run(tmp_path, flags, SLURM_RESTART_COUNT="1")
    run.at_step(STEPS)
    for _ in range(200):  # until it is gone: in the last save, and while the interpreter ends
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
    left, stalls = tmp_path / "slurm" / "left", tmp_path / "stalls"
    left.write_text("0:18")
    flags = f"--recipe {SLOW_DISK} {flags}"
    run = Run(tmp_path, flags, STALLS=str(stalls))
    run.at_step(15)
    stalls.touch()
    run.signal(signal.SIGUSR2)
    while not list(run.out.glob("checkpoints/*.tmp-*")):
        time.sleep(0.01)
    left.write_text("0:14")
    while not run.requeued:
        time.sleep(0.05)
    for pid in (run.pid, run.task(0), run.task(1)):
        os.kill(pid, signal.SIGKILL)
    run.ended()
    done = run.ledger.count(b"\n")
    stalls.unlink()
    left.unlink()
    assert "unless that ends in time, what was trained after step 10 is done again" in run.said
    again = Run(tmp_path, flags, SLURM_RESTART_COUNT="1", STALLS=str(stalls))
    assert again.ended() == 0, again.said
    assert again.ledger == oracle
    assert again.lost == [0, done - 10]
    assert again.requeued == 1


def _catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_rank_that_is_stopped_is_named_and_the_run_goes_on_without_a_hand(oracle, flags, tmp_path):
    run = Run(tmp_path, f"{flags} --watchdog.least 12", FAKE_KILL_WAIT="2")
    run.at_step(15)
    run.signal(signal.SIGSTOP, ranks=(1,))
    assert run.ended() == 0, run.said
    assert run.ledger == oracle
    assert [end.code for end in run.ends] == [70, 0]
    assert "the run hangs" in run.ends[0].reason
    assert "rank 1 on nowhere1 (no sign of life for" in run.ends[0].reason
    assert "pretrain/loop.py" in (run.out / "stacks" / "rank-0.txt").read_text()
    assert not (run.out / "stacks" / "rank-1.txt").exists(), "it does not answer"


def test_building_that_does_not_end_ends_the_run(flags, tmp_path):
    """As if it had hung: nothing is built in a hundredth of a second."""
    out = tmp_path / "run"
    short = "--watchdog.least 0.01 --watchdog.most 0.01"
    command = f"{sys.executable} -m pretrain.launch {FLAGS} {flags} {short} --out {out}".split()
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 70
    assert "rank 0: the run hangs (building for 0 s, longer than --watchdog.most)" in ended.stderr
    assert "pretrain/prepare.py" in (out / "stacks" / "rank-0.txt").read_text()


def test_a_run_that_is_stopped_as_a_whole_and_continued_goes_on(oracle, flags, tmp_path):
    run = Run(tmp_path, f"{flags} --watchdog.least 12")
    run.at_step(15)
    run.signal(signal.SIGSTOP)
    time.sleep(16)
    run.signal(signal.SIGCONT)
    assert run.ended() == 0, run.said
    assert run.ledger == oracle
    assert len(run.ends) == 1


def test_what_is_wrong_on_one_rank_ends_all_and_is_the_reason(flags, tmp_path):
    """The other one waits for it, and is not to speak of lost connections."""
    run = Run(tmp_path, flags, FAKE_RANK="1", FAKE_RANK_SETS="MEDLEY_RENDEZVOUS_SECONDS=soon")
    begun = time.monotonic()
    assert run.ended() == 2, run.said
    assert time.monotonic() - begun < 60
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
    run = Run(tmp_path, flags, by=TORCHRUN)
    run.at_step(10)
    os.kill(run.pid, signal.SIGTERM)
    assert run.ended() == 75, run.said
    run = Run(tmp_path, flags, by=TORCHRUN)
    assert run.ended() == 0, run.said
    assert run.ledger == oracle
    assert run.lost == [0, 0]


def test_a_zombie_of_an_earlier_start_writes_nothing_more(oracle, flags, tmp_path):
    """Its supervisor and its node are thought lost; the job runs again, and then it wakes up."""
    zombie = Run(tmp_path, flags)
    zombie.at_step(12)
    zombie.signal(signal.SIGSTOP)
    ranks = [zombie.task(rank) for rank in (0, 1)]
    run = Run(tmp_path, flags, SLURM_RESTART_COUNT="1")
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
