"""The benchmark of the vocabulary head: all say the same, and the bars are held against what is measured."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import beside, head

ROOT = Path(__file__).resolve().parents[2]
EXTRA = [[], ["--smoothing", "0.1"], ["--smoothing", "0.1", "--z-loss", "0.01"], ["--bf16"]]


@pytest.fixture
def small(monkeypatch):
    """A few tokens; Medley's time is given, beside 1 of the others, and its memory is 0.7 of theirs."""
    monkeypatch.setattr(head, "WIDTH", 8)
    monkeypatch.setattr(head, "TOKENS", 64)
    monkeypatch.setattr(head, "CHUNK", 16)
    monkeypatch.setattr(head, "in_own_process", lambda _, given: 0.7 if given[-1] == "medley" else 1.0)

    def took(ours):
        times = {"medley": ours}
        monkeypatch.setattr(head, "in_turns", lambda calls, **_: {at: [times.get(at, 1.0)] for at in calls})

    return took


@pytest.mark.parametrize("extra", EXTRA)
def test_all_have_the_same_gradients(small, capsys, extra):
    small(0.5)
    assert head.main(["--vocabulary", "50", *extra]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert [row[0] for row in rows[:3]] == ["medley", "open_clip", "torch"]
    chunked = "--smoothing" not in extra and hasattr(torch.nn.functional, "linear_cross_entropy")
    assert len(rows) == 3 + chunked
    assert all(float(row[-1]) < (2e-2 if "--bf16" in extra else 1e-5) for row in rows)


@pytest.mark.parametrize(("ours", "code"), [(0.6, 0), (0.7, 1)])
def test_bars(small, capsys, ours, code):
    small(ours)
    assert head.main(["--vocabulary", "50", "--only", "medley,open_clip"]) == code
    assert capsys.readouterr().out.splitlines()[-1].endswith("met" if code == 0 else "MISSED")


def test_all_have_the_same_loss(small):
    torch.manual_seed(0)
    losses = head.implementations(smoothing=0.1, z_loss=0.01)
    states, targets = torch.randn(64, 8), torch.randint(50, (64,))
    matrix = torch.nn.Parameter(torch.randn(50, 8))
    first, *others = (float(loss(states, matrix, targets).detach()) for loss in losses.values())
    assert others == pytest.approx([first] * len(others), rel=1e-6)


def test_rounds_are_in_turns_after_one_that_is_not_counted():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = beside.in_turns(calls, rounds=2, device=torch.device("cpu"))
    assert order == [*"ababab"]
    assert {name: len(each) for name, each in found.items()} == {"a": 2, "b": 2}
    assert beside.ratio([1.0, 4.0, 3.0], [2.0, 4.0, 2.0]) == 1.0


GROWS = """
import torch
from benchmarks import beside
kept = []
print(beside.growth(lambda: kept.append(torch.ones(25 << 20)), torch.device("cpu")))
"""


def test_memory_grows_by_what_a_call_holds():
    """In a process that holds little else: the kernel may take pages of a large one meanwhile."""
    done = subprocess.run([sys.executable, "-c", GROWS], cwd=ROOT, check=True, capture_output=True)
    assert 90 < float(done.stdout) < 120


def test_a_number_comes_back_from_a_process_of_its_own():
    assert beside.in_own_process("benchmarks.head", ["--vocabulary", "64", "--memory", "medley"]) > 0
