import os
import signal
from contextlib import suppress

import pytest

from pretrain.preempt import SIGNALS, Preemption


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
