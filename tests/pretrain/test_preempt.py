import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from pretrain.preempt import SIGNALS, Preemption, sheltered

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_sets_the_flag_and_nothing_else(number):
    with Preemption() as preemption:
        assert preemption.requested is None
        os.kill(os.getpid(), number)
        assert preemption.requested == signal.Signals(number).name


def test_a_second_ctrl_c_interrupts_at_once():
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_other_signals_may_repeat_and_the_first_keeps_its_name():
    with Preemption() as preemption:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        assert preemption.requested == "SIGTERM"


def test_the_handlers_before_come_back_also_after_an_error():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with suppress(RuntimeError), Preemption():
        assert all(signal.getsignal(number) != before[number] for number in SIGNALS)
        raise RuntimeError
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_started_sheltered_never_hears_them(number):
    """As the process that feeds W&B: a scheduler signals every process of a job."""
    with sheltered():
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child.send_signal(number)
    assert child.stdin is not None
    child.communicate(b"\n", timeout=300)
    assert child.returncode == 0


def test_whoever_ends_a_process_that_is_ending_does_not_change_its_code():
    code = (
        "import os, signal, sys; from pretrain import preempt; preempt.Preemption().__enter__(); "
        "preempt.ignore(); [os.kill(os.getpid(), each) for each in preempt.SIGNALS]; sys.exit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 3
