import io
import math
import os
import pty
import re
from contextlib import suppress

import pytest

from pretrain.sinks.console import Bar, Lines, console

VALUES = {
    "samples": 640,
    "train/loss": 5.5,
    "train/loss/itc": 3.25,
    "train/loss/lm": 2.12345,
    "train/itc/accuracy": 0.5,
    "perf/samples_per_second": 512.4,
    "perf/data_wait": 0.031,
    "perf/seconds_left": 252.2,
}


def test_one_plain_line_per_report_where_the_output_is_a_file():
    stream = io.StringIO()
    sink = console(stream, total=100)
    assert isinstance(sink, Lines)
    sink.note("training")
    sink.step(10, VALUES)
    sink.step(20, {**VALUES, "perf/seconds_left": math.inf, "train/loss/itc": math.nan})
    sink.close()
    assert stream.getvalue().splitlines() == [
        "training",
        "step 10/100  itc 3.2500  lm 2.1235  512/s  wait 3%  left 0:04:12",
        "step 20/100  itc nan  lm 2.1235  512/s  wait 3%  left ?",
    ]


def test_a_line_tells_what_a_step_goes_into_and_leaves_trifles_out():
    stream = io.StringIO()
    parts = {"forward": 0.31, "backward": 0.6, "optimizer": 0.04, "wait": 0.001, "data": 0.03}
    used = {"perf/mfu": 0.284, **{f"perf/part/{part}": share for part, share in parts.items()}}
    console(stream, total=100).step(10, {**VALUES, **used})
    assert stream.getvalue().endswith(
        "512/s  mfu 28%  wait 3%  left 0:04:12  (forward 31% backward 60% optimizer 4% data 3%)\n"
    )


@pytest.fixture
def terminal(monkeypatch):
    """A stream on a pseudo-terminal of 100 columns, and all that was shown on it so far."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    seen = bytearray()

    def shown():
        with suppress(BlockingIOError):
            while True:
                seen.extend(os.read(master, 1 << 16))
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())

    with os.fdopen(slave, "w") as stream:
        yield stream, shown
    os.close(master)


def test_a_bar_on_a_terminal(terminal):
    stream, shown = terminal
    sink = console(stream, total=100, done=5)
    assert isinstance(sink, Bar)
    sink.note("resuming at [step 5]")
    assert shown() == "resuming at [step 5]\r\n"
    sink.step(10, VALUES)
    bar = shown().splitlines()[-1]
    assert re.search(r" 10/100 .*512/s  wait 3%  left 0:04:12 +itc 3.2500  lm 2.1235", bar)
    assert len(bar) <= 100
    sink.note("saved")
    sink.step(20, VALUES)
    assert "saved" in shown()
    assert " 20/100 " in shown()
    sink.close()


def test_many_objectives_shorten_the_bar_and_never_wrap_it(terminal):
    stream, shown = terminal
    sink = console(stream, total=10**6)
    sink.step(10, {**VALUES, **{f"train/loss/objective{i}": 1.0 for i in range(9)}})
    sink.close()
    lines = [line for line in shown().splitlines() if line]
    assert lines
    assert all(len(line) <= 100 and "/1000000" in line and "left 0:04:12" in line for line in lines)
