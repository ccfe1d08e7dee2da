"""What Slurm says, read; the calls themselves are in test_supervise.py."""

import os
from pathlib import Path

import pytest

from pretrain import requeue
from pretrain.requeue import seconds_left

FAKES = Path(__file__).resolve().parent / "fakes"


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("0:15", 15),
        ("59:30", 3570),
        ("1:00:00", 3600),
        ("2-03:04:05", 183845),
        ("UNLIMITED", float("inf")),
        ("INVALID", None),
        ("", None),
    ],
)
def test_the_time_left_is_read_as_slurm_writes_it(tmp_path, monkeypatch, said, seconds):
    (tmp_path / "left").write_text(said)
    monkeypatch.setenv("PATH", f"{FAKES}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path))
    monkeypatch.setattr(requeue, "_GLANCE", 300.0)  # a busy machine starts no program at once
    assert seconds_left("7") == seconds
