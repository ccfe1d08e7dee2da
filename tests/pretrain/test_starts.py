from pretrain.starts import read_starts, record_start


def start(path, step, done):
    return record_start(path, step=step, stage="one", done=done, ranks=2, device="cpu")


def test_restarts_and_lost_steps_add_up(tmp_path):
    path = tmp_path / "starts.jsonl"
    assert not list(read_starts(path))
    first = start(path, 0, 0)
    assert (first.restarts, first.lost_steps) == (0, 0)
    start(path, 6, 9)
    third = start(path, 12, 13)
    assert (third.restarts, third.lost_steps) == (2, 4)
    assert [(each.step, each.lost, each.ranks) for each in read_starts(path)] == [
        (0, 0, 2),
        (6, 3, 2),
        (12, 1, 2),
    ]


def test_the_first_start_of_a_stage_is_no_restart(tmp_path):
    path = tmp_path / "starts.jsonl"
    for stage, step in (("one", 0), ("one", 5), ("two", 10)):
        starts = record_start(path, step=step, stage=stage, done=step, ranks=1, device="cpu")
    assert starts.restarts == 1


def test_what_was_allowed_to_change_is_on_record_and_older_lines_have_none(tmp_path):
    path = tmp_path / "starts.jsonl"
    path.write_text('{"time": 17, "step": 0, "stage": "one", "lost": 0, "ranks": 1, "device": "cpu"}\n')
    words = ("seed (0 there, 5 here)", "the source books, which is new")
    record_start(path, step=6, stage="one", done=6, ranks=1, device="cpu", changed=words, alone=True)
    assert [(tuple(each.changed), each.alone) for each in read_starts(path)] == [((), False), (words, True)]


def test_a_line_torn_by_a_crash_costs_only_itself(tmp_path):
    path = tmp_path / "starts.jsonl"
    start(path, 0, 0)
    with path.open("ab") as file:
        file.write(b'{"time": 17}\n{"time": 17')
    assert start(path, 6, 9).restarts == 1
    assert start(path, 9, 9).lost_steps == 3
