"""The benchmark of micro-batches counts passes, and less is held in more of them."""

import pytest

from benchmarks import microbatches
from benchmarks.microbatches import Cost

FLAGS = ("--objectives", "itc,itm", "--stages.one.batch", "16", "--stages.one.resolution", "32")


@pytest.mark.skipif(not microbatches._CLEAR.exists(), reason="counts memory as Linux says it")
def test_towers_run_once_more_where_micro_batches_are_coupled():
    cost = microbatches.measure(FLAGS, micro_batches=2, steps=1)
    assert cost.runs == {"image": 4, "text": 6, "fusion": 2}
    assert cost.cpu_seconds > 0


def test_a_line_for_each_number(monkeypatch, capsys):
    asked = []

    def child(arguments, environment):
        asked.append((arguments, "MALLOC_TRIM_THRESHOLD_" in environment))
        return Cost(100.0, 0.5, {"image": 2})

    monkeypatch.setattr(microbatches, "_child", child)
    assert microbatches.main(["--", *FLAGS]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == " ".join(FLAGS)
    assert [line.split()[0] for line in lines] == ["1", "2", "4", "8"]
    assert lines[0] == "1 micro-batches: 100 MB, 0.50 CPU s a step; image 2"
    assert [frugal for _, frugal in asked] == [True, False] * 4
