"""The supervisor with small commands, and with a scheduler that obeys, fails, hangs or says no."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datasets.atomic import replace
from pretrain.attempts import Event, note, read_attempts
from pretrain.supervise import Supervisor, main, newest_step, run_directory

ROOT = Path(__file__).resolve().parents[2]
FAKES = Path(__file__).resolve().parent / "fakes"


class Supervised:
    """A supervisor whose command does in turn what it is told."""

    def __init__(
        self,
        tmp_path: Path,
        what: str,
        *,
        job: str = "",
        behaviour: str = "",
        left: str = "UNLIMITED",
        **more: str,
    ) -> None:
        self.out = tmp_path / "run"
        self._slurm = tmp_path / "slurm"
        self._slurm.mkdir()
        (self._slurm / "behaviour").write_text(behaviour)
        (self._slurm / "left").write_text(left)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment = {
            **clean,
            "PATH": f"{FAKES}:{os.environ['PATH']}",
            "FAKE_SLURM": str(self._slurm),
            "MEDLEY_REQUEUE_SECONDS": "120",
            **({"SLURM_JOB_ID": job, "FAKE_KILLS": "1"} if job else {}),
            **more,
        }
        command = [sys.executable, str(FAKES / "child.py"), str(self.out), what, "--out", str(self.out)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pretrain.supervise", "--", *command],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        (self._slurm / "supervisor").write_text(str(self.pid))

    def ended(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        _, said = self._process.communicate(timeout=300)
        return self._process.returncode, said

    def wait_until_ready(self) -> None:
        while not (self.out / "ready").exists():
            time.sleep(0.01)

    def limit_when_ready(self, left: str) -> None:
        """Once the command waits, the job's time left is this."""
        self.wait_until_ready()
        replace(self._slurm / "left", left.encode())

    def signal_when_ready(self, number: int) -> int:
        """Once the command waits; the process of the command."""
        self.wait_until_ready()
        child = int((self.out / "ready").read_text())
        os.kill(self.pid, number)
        return child

    def end_after_call(self, word: str) -> None:
        """End the supervisor as Slurm does, once it has called scontrol for this."""
        while not any(call.startswith(word) for call in self.calls):
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGTERM)

    @property
    def calls(self) -> list[str]:
        """How scontrol was called, but for the questions."""
        calls = self._slurm / "calls"
        said = calls.read_text().splitlines() if calls.exists() else []
        return [call for call in said if not call.startswith("show")]

    @property
    def events(self) -> list[Event]:
        return list(read_attempts(self.out))

    @property
    def starts(self) -> int:
        return len((self.out / "count").read_text())


@pytest.mark.parametrize("code", [0, 2])
def test_what_is_done_or_the_users_to_mend_is_not_started_again(tmp_path, code):
    run = Supervised(tmp_path, str(code), job="7")
    assert run.ended() == (code, "")
    assert run.starts == 1
    assert run.calls == []
    assert [each.event for each in run.events] == ["start", "end"]


def test_a_crash_is_started_again_in_place(tmp_path):
    run = Supervised(tmp_path, "die,0", job="7")
    code, said = run.ended()
    assert code == 0
    assert "supervise: it ended with code 137: it is started again" in said
    assert [each.event for each in run.events] == ["start", "end", "restart", "start", "end"]
    assert [each.code for each in run.events] == [None, 137, None, None, 0]
    assert run.calls == []


def test_three_crashes_in_a_row_without_a_new_checkpoint_are_the_end(tmp_path):
    """A start that got on counts anew."""
    run = Supervised(tmp_path, "5,5,save5,5,5,6")
    code, said = run.ended()
    assert code == 6
    assert "3 starts in a row ended without a new checkpoint, the last with code 6" in said
    assert run.starts == 6
    assert [each.step for each in run.events if each.event == "end"] == [-1, -1, 3, 3, 3, 3]
    assert run.events[-1].event == "give up"


def test_what_was_interrupted_goes_back_to_the_queue_once_and_is_not_held_there(tmp_path):
    run = Supervised(tmp_path, "75", job="7")
    code, said = run.ended()
    assert code == 75
    assert "job 7 is in the queue again" in said
    assert run.calls == ["requeue 7", "update JobId=7 StartTime=now+10"]
    assert run.starts == 1
    assert run.events[-1].event == "requeue"


@pytest.mark.parametrize(("job", "step", "requeued"), [("7", -1, False), ("6", -1, True), ("7", 5, True)])
def test_a_job_that_was_requeued_three_times_where_it_stands_is_not_requeued_again(
    tmp_path, job, step, requeued
):
    """Those of another job do not count, nor those from before the newest checkpoint."""
    for at in (-1, -1, step):
        note(tmp_path / "run", Event(event="requeue", attempt=f"{job}.0.1", job=job, step=at))
    run = Supervised(tmp_path, "75", job="7")
    code, said = run.ended()
    assert code == 75
    assert (run.calls[:1] == ["requeue 7"]) is requeued
    assert (run.events[-1].event == "give up") is not requeued
    assert ("longer --time or a shorter warning" in said) is not requeued


def test_attempts_that_can_no_longer_be_noted_change_no_exit_code(tmp_path):
    """After the first start the file is a directory."""
    run = Supervised(tmp_path, "seal,7,7")
    code, said = run.ended()
    assert code == 7
    assert said.count("no longer noted") == 1
    assert run.starts == 3


def test_outside_slurm_it_only_says_that_it_was_interrupted(tmp_path):
    run = Supervised(tmp_path, "75")
    assert run.ended() == (75, "")
    assert run.calls == []


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("JobState=CANCELLED Requeue=1 BatchFlag=1", "job 7 was cancelled: it stays so"),
        (
            "JobState=COMPLETING RunTime=00:59:59 TimeLimit=1-00:00:00 Requeue=1 BatchFlag=1",
            "job 7 was cancelled: it stays so",
        ),
        ("JobState=COMPLETING RunTime=3-00:00:00 TimeLimit=UNLIMITED Requeue=1 BatchFlag=1", "was cancelled"),
        ("JobState=RUNNING Requeue=0 BatchFlag=1", "may not be requeued: submit it with --requeue"),
        ("JobState=RUNNING Requeue=1 BatchFlag=0", "no batch script"),
    ],
)
def test_a_job_that_was_cancelled_or_may_not_come_back_is_left(tmp_path, answer, sentence):
    run = Supervised(tmp_path, "75", job="7", behaviour=f"show {answer}")
    code, said = run.ended()
    assert code == 75
    assert sentence in said
    assert run.calls == []
    assert run.events[-1].event == "leave"


def test_a_job_comes_back_that_saved_after_its_time_limit(tmp_path):
    late = "show JobState=COMPLETING RunTime=1-00:00:02 TimeLimit=1-00:00:00 Requeue=1 BatchFlag=1 Restarts=0"
    run = Supervised(tmp_path, "75", job="7", behaviour=late)
    assert run.ended()[0] == 75
    assert run.calls[0] == "requeue 7"


@pytest.mark.parametrize("code", [0, 75, 137])
def test_a_job_that_still_saves_shortly_before_its_limit_is_requeued_once(tmp_path, code):
    """Slurm then ends what is left of it, whatever comes of that."""
    (tmp_path / "run" / "checkpoints" / "step-00000040").mkdir(parents=True)
    run = Supervised(tmp_path, f"late{code}", job="7", left="0:16")
    run.limit_when_ready("0:15")
    ended, said = run.ended()
    assert ended == 75
    assert "the time limit of job 7 comes within 15 s and its last save is not done: unless that ends" in said
    assert "in time, what was trained after step 40 is done again" in said
    assert run.calls == ["requeue 7", "update JobId=7 StartTime=now+45", "update JobId=7 StartTime=now+10"]
    assert [each.event for each in run.events] == ["start", "requeue", "end"]
    assert run.starts == 1


def test_a_limit_that_is_far_or_moves_away_ends_nothing(tmp_path):
    run = Supervised(tmp_path, "slow0", job="7", left="0:16")
    assert run.ended() == (0, "")
    assert run.calls == []


def test_a_job_that_may_not_come_back_saves_until_its_limit_all_the_same(tmp_path):
    refused = "show JobState=RUNNING Requeue=0 BatchFlag=1\n"
    run = Supervised(tmp_path, "late75", job="7", left="0:16", behaviour=refused * 2)
    run.limit_when_ready("0:05")
    ended, said = run.ended()
    assert ended == 75
    assert said.count("may not be requeued: submit it with --requeue") == 2
    assert run.calls == []
    assert [each.event for each in run.events] == ["start", "leave", "end", "leave"]


def test_a_job_that_was_restarted_elsewhere_meanwhile_is_not_touched(tmp_path):
    again = "show JobState=RUNNING Requeue=1 BatchFlag=1 Restarts=1"
    run = Supervised(tmp_path, "75", job="7", behaviour=again)
    code, said = run.ended()
    assert code == 75
    assert "runs again elsewhere" in said
    assert run.calls == []


def test_a_call_that_seemed_to_hang_and_had_worked_is_not_made_twice(tmp_path):
    behaviour = "requeue fail\nshow ok\nshow JobState=COMPLETING Requeue=1 BatchFlag=1 Restarts=1"
    run = Supervised(tmp_path, "75", job="7", behaviour=behaviour)
    run.end_after_call("update")
    code, said = run.ended()
    assert code == 75
    assert "job 7 is in the queue again" in said
    assert run.calls == ["requeue 7", "update JobId=7 StartTime=now+10"]


def test_a_controller_that_fails_for_a_while_is_asked_again(tmp_path):
    run = Supervised(tmp_path, "75", job="7", behaviour="show fail\nrequeue fail\nupdate fail")
    code, said = run.ended()
    assert code == 75
    assert said.count("did not work") == 2
    assert run.calls == ["requeue 7", "requeue 7", *["update JobId=7 StartTime=now+10"] * 2]


def test_a_controller_that_hangs_has_an_end_and_a_way_out(tmp_path):
    run = Supervised(tmp_path, "75", job="7", behaviour="show hang", MEDLEY_REQUEUE_SECONDS="1.5")
    code, said = run.ended()
    assert code == 75
    assert "did not work within 1.5 s" in said
    assert "submit the same command again" in said
    assert run.calls == []


def test_ctrl_c_is_passed_on_and_nothing_is_started_again(tmp_path):
    run = Supervised(tmp_path, "wait", job="7")
    run.signal_when_ready(signal.SIGINT)
    assert run.ended() == (75, "")
    assert run.starts == 1
    assert run.calls == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_warning_to_itself_is_survived_and_passed_on(tmp_path, number):
    run = Supervised(tmp_path, "wait", job="7")
    run.signal_when_ready(number)
    assert run.ended()[0] == 75
    assert run.calls == ["requeue 7", "update JobId=7 StartTime=now+10"]


def test_a_command_that_met_the_signal_before_it_could_note_it_is_requeued_all_the_same(tmp_path):
    run = Supervised(tmp_path, "term", job="7")
    assert run.ended()[0] == 75
    assert run.calls[0] == "requeue 7"


@pytest.mark.parametrize(
    ("command", "term", "usr2"),
    [
        ("srun --signal=x python -m pretrain.launch", "SIGUSR2", "SIGUSR2"),
        ("/opt/bin/python3.12 -X dev -m pretrain.launch --seed 1", "SIGTERM", "SIGUSR2"),
        ("torchrun --nproc-per-node 8 -m pretrain.launch", "SIGTERM", "SIGTERM"),
        ("python -m torch.distributed.run -m pretrain.launch", "SIGTERM", "SIGTERM"),
        ("./train.sh", "SIGTERM", "SIGTERM"),
    ],
)
def test_a_launcher_that_would_die_of_the_warning_hears_the_signal_that_it_knows(
    tmp_path, command, term, usr2
):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    supervisor = Supervisor(command.split(), tmp_path)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert supervisor._heard(signal.SIGTERM) == signal.Signals[term]
    assert supervisor._heard(signal.SIGUSR2) == signal.Signals[usr2]
    died = supervisor._next(128 + signal.SIGUSR2, barren=1)
    assert died == ("leave" if usr2 == "SIGUSR2" else "restart")


def test_the_command_ends_with_the_supervisor_however_that_ends(tmp_path):
    run = Supervised(tmp_path, "wait")
    child = run.signal_when_ready(signal.SIGKILL)
    assert run.ended()[0] == -signal.SIGKILL
    end = time.monotonic() + 300
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not Path(f"/proc/{child}").exists()


def test_it_starts_without_torch():
    code = "import sys, pretrain.supervise; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "write: python -m pretrain.supervise"),
        (["--", "true"], "name the run directory: --out RUN_DIR"),
        (["--out", "{out}", "--", "no-such-program"], "no-such-program cannot be started"),
        (["--out", "/proc/nothing", "--", "true"], "choose another --out"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(tmp_path, arguments, sentence):
    command = [word.format(out=tmp_path) for word in arguments]
    ended = subprocess.run(
        [sys.executable, "-m", "pretrain.supervise", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert sentence in ended.stderr
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_no_mistake(flag, capsys):
    assert main([flag]) == 0
    assert capsys.readouterr().out.startswith(
        "usage: python -m pretrain.supervise [--out RUN_DIR] -- COMMAND"
    )


def test_the_run_directory_is_the_last_one_that_the_command_names():
    command = ["srun", "python", "-m", "pretrain.launch", "--out", "runs/a", "--seed", "1", "--out=runs/b"]
    assert run_directory(command) == Path("runs/b")
    assert run_directory(["srun"]) is None
    assert run_directory(["srun", "--out=log-%t", *command[1:6]]) == Path("runs/a")
    assert run_directory(["srun", "--out=log-%t", "python", "-m", "pretrain.launch"]) is None


def test_only_a_directory_with_the_name_of_a_step_is_a_checkpoint(tmp_path):
    assert newest_step(tmp_path) == -1
    for name in ("step-00000003", "step-00000009.tmp-12ab", "step-00000007.corrupt", "step-00000005"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 5


def test_a_torn_line_of_the_attempts_is_left_out(tmp_path):
    line = json.dumps({"event": "start", "attempt": "7.0.1"})
    (tmp_path / "attempts.jsonl").write_text(f'{line}\n{{"event": "en')
    assert [each.event for each in read_attempts(tmp_path)] == ["start"]
