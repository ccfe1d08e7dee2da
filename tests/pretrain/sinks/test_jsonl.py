import json
import math
import time

from pretrain.sinks.jsonl import JsonLines, read


def write(path, steps, after=0, **more):
    sink = JsonLines(path, after=after)
    for step in steps:
        sink.step(step, {"samples": step * 64, "train/loss": 1 / step, **more})
    return sink


def test_one_object_per_report_at_once_on_file(tmp_path):
    sink = write(tmp_path / "m", [10, 20])
    sink.note("not a number")
    lines = (tmp_path / "m").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert 0 <= time.time() - records[0].pop("time") < 60
    assert records[1].pop("time")
    assert records == [
        {"step": 10, "samples": 640, "train/loss": 0.1},
        {"step": 20, "samples": 1280, "train/loss": 0.05},
    ]


def test_resume_supersedes_later_records_and_keeps_each_step_once(tmp_path):
    path = tmp_path / "m"
    write(path, [10, 20, 30, 40]).close()
    write(path, [30, 40, 50], after=20, again=1.0).close()
    assert [(r["step"], "again" in r) for r in read(path)] == [
        (10, False),
        (20, False),
        (30, True),
        (40, True),
        (50, True),
    ]
    inode = path.stat().st_ino
    JsonLines(path, after=50).close()
    assert path.stat().st_ino == inode
    JsonLines(path).close()
    assert path.read_bytes() == b""
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "m"
    write(path, [10, 20]).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert [r["step"] for r in read(path)] == [10]
    write(path, [20], after=20).close()
    assert [(r["step"], r["train/loss"]) for r in read(path)] == [(10, 0.1), (20, 0.05)]


def test_what_is_not_finite_is_null_and_the_json_strict(tmp_path):
    sink = JsonLines(tmp_path / "m")
    sink.step(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1})

    def refuse(word):
        raise AssertionError(word)

    line = (tmp_path / "m").read_text()
    record = json.loads(line, parse_constant=refuse)
    assert record.pop("time")
    assert record == {"step": 1, "a": None, "b": None, "c": None, "d": 0.1}
