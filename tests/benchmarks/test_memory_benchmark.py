"""The benchmark of memory: it counts after each epoch, and a run that grows misses the bar."""

import pytest

from benchmarks import memory
from benchmarks.memory import Held


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A few samples, and what is counted after each epoch is given."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(memory, "SHARDS", 2)
    monkeypatch.setattr(memory, "SAMPLES", 50)

    def counted(*found):
        counts = iter(found)
        monkeypatch.setattr(memory, "held", lambda: next(counts))

    return counted


@pytest.mark.parametrize(
    ("last", "code"),
    [(Held(104.0, 20, 5), 0), (Held(90.0, 19, 4), 0), (Held(106.0, 20, 5), 1), (Held(100.0, 21, 5), 1),
     (Held(100.0, 20, 6), 1)],
)  # fmt: skip
def test_what_the_last_epoch_adds_to_the_first_is_held_against_the_bar(small, capsys, last, code):
    small(Held(100.0, 20, 5), Held(500.0, 20, 5), last)
    assert memory.main([]) == code
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[-4:-1]] == ["epoch 1", "epoch 2", "epoch 3"]
    assert said[-1].endswith("met" if code == 0 else "MISSED")


def test_this_process_holds_something():
    now = memory.held()
    assert now.megabytes > 50
    assert now.files >= 3
    assert now.threads >= 1
