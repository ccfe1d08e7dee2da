import json

import pytest

from pretrain.mirror.rows import ReplacedError, Rows


def append(path, *records):
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def test_the_records_of_a_step_are_one_row_held_back_until_the_next(tmp_path):
    path = tmp_path / "m"
    rows = Rows(path)
    assert list(rows.new()) == []
    append(path, {"step": 2, "loss": 1.0, "left": None})
    assert list(rows.new()) == []
    assert rows.last_step == 2
    append(path, {"step": 2, "recall": 0.5, "left": None}, {"step": 4, "loss": 0.5})
    assert list(rows.new()) == [{"step": 2, "loss": 1.0, "recall": 0.5}]
    assert list(rows.new()) == []
    assert list(rows.new(ended=True)) == [{"step": 4, "loss": 0.5}]
    assert list(rows.new(ended=True)) == []


def test_a_line_counts_when_it_is_whole(tmp_path):
    path = tmp_path / "m"
    rows = Rows(path)
    append(path, {"step": 2, "loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert list(rows.new()) == []
    with path.open("a") as file:
        file.write('ss": 0.5}\n')
    assert list(rows.new(ended=True)) == [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 0.5}]
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert list(rows.new(ended=True)) == []


def test_what_is_no_record_is_passed_over(tmp_path, caplog):
    path = tmp_path / "m"
    append(path, {"step": 2}, "text", 3, None)
    with path.open("ab") as file:
        file.write(b"\0\xff\0\n\n")
    append(path, {"loss": 1.0}, {"step": 4})
    assert list(Rows(path).new(ended=True)) == [{"step": 2}, {"step": 4}]
    assert len(caplog.records) == 6


@pytest.mark.parametrize("how", ["renamed", "cut", "gone"])
def test_another_file_in_its_place_is_noticed(tmp_path, how):
    path = tmp_path / "m"
    append(path, {"step": 2}, {"step": 4}, {"step": 6})
    rows = Rows(path)
    assert list(rows.new()) == [{"step": 2}, {"step": 4}]
    if how == "renamed":
        append(tmp_path / "n", {"step": 2}, {"step": 4}, {"step": 6}, {"step": 8})
        (tmp_path / "n").rename(path)
    elif how == "cut":
        path.write_text(path.read_text()[:5])
    else:
        path.unlink()
    with pytest.raises(ReplacedError):
        list(rows.new())
