import math
import os
import struct
from hashlib import blake2b

from pretrain.ledger import Ledger

KEYS = ["a.tar/1", "a.tar/2"]


def test_a_line_holds_the_step_the_samples_and_the_bits(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    assert ledger.record(1, KEYS, loss=0.1, norm=2.0) is None
    samples = blake2b(b"a.tar/1\0a.tar/2", digest_size=8).hexdigest()
    expected = f"1 1 {samples} {struct.pack('>d', 0.1).hex()} 4000000000000000"
    # Before close or flush: a killed process loses nothing.
    assert (tmp_path / "ledger").read_text() == expected + "\n"
    assert ledger.final() == {1: expected}


def test_a_step_run_again_is_compared_and_not_written_twice(tmp_path):
    path = tmp_path / "ledger"
    first = Ledger(path)
    for step in (1, 2, 3):
        first.record(step, KEYS, loss=1 / step, norm=math.nan)
    first.close()
    content = path.read_text()
    again = Ledger(path)
    assert again.record(2, KEYS, loss=1 / 2, norm=math.nan) is None
    alarm = str(again.record(3, KEYS, loss=math.nextafter(1 / 3, 1), norm=math.nan))
    assert "step 3" in alarm
    assert "loss is 0.33333333333333337, where it was 0.3333333333333333" in alarm
    assert "samples" not in alarm
    assert "norm" not in alarm
    alarm = str(again.record(2, KEYS[::-1], loss=1 / 2, norm=1.0))
    assert "samples" in alarm
    assert "gradient norm is 1.0, where it was nan" in alarm
    assert path.read_text() == content
    assert again.record(4, KEYS, loss=1.0, norm=1.0) is None
    assert list(again.final()) == [1, 2, 3, 4]
    assert again.final() == Ledger(path).final()


def test_minus_zero_is_not_zero_and_joined_keys_are_not_two(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    ledger.record(1, ["ab", "c"], loss=0.0, norm=1.0)
    assert "loss" in str(ledger.record(1, ["ab", "c"], loss=-0.0, norm=1.0))
    assert "samples" in str(ledger.record(1, ["a", "bc"], loss=0.0, norm=1.0))


def test_on_other_ranks_only_the_samples_are_promised(tmp_path):
    Ledger(tmp_path / "ledger", ranks=1).record(1, KEYS, loss=1.0, norm=1.0)
    other = Ledger(tmp_path / "ledger", ranks=2)
    assert other.record(1, KEYS, loss=1.0 + 1e-15, norm=1.0) is None
    assert "samples" in str(other.record(1, KEYS[:1], loss=1.0, norm=1.0))


def test_a_torn_last_line_is_cut_off_wherever_it_tore(tmp_path):
    path = tmp_path / "ledger"
    whole = Ledger(path)
    for step in (1, 2):
        whole.record(step, KEYS, loss=1.0, norm=1.0)
    content = path.read_bytes()
    for size in range(len(content) // 2 + 1, len(content)):
        path.write_bytes(content)
        os.truncate(path, size)
        ledger = Ledger(path)
        assert list(ledger.final()) == [1]
        assert ledger.record(2, KEYS, loss=1.0, norm=1.0) is None
        ledger.close()
        assert path.read_bytes() == content


def test_a_line_of_rubbish_counts_as_not_there(tmp_path):
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    ledger.record(1, KEYS, loss=1.0, norm=1.0)
    with path.open("ab") as file:
        file.write(b"\0" * 50 + b"\n")
    again = Ledger(path)
    again.record(2, KEYS, loss=1.0, norm=1.0)
    assert list(Ledger(path).final()) == [1, 2]


def test_what_is_forgotten_is_gone_and_done_anew(tmp_path):
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    for step in (1, 2, 3):
        ledger.record(step, KEYS, loss=1.0, norm=1.0)
    ledger.forget(after=3)
    assert ledger.done == 3
    ledger.forget(after=1)
    assert list(Ledger(path).final()) == list(ledger.final()) == [1]
    assert ledger.record(2, ["others"], loss=2.0, norm=1.0) is None
    assert ledger.final() == Ledger(path).final()
    assert list(ledger.final()) == [1, 2]


def test_flush_reaches_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    Ledger(tmp_path / "ledger").flush()
    assert len(synced) == 1
