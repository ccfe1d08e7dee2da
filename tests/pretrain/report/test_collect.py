import json

import numpy as np
import pytest
import yaml

from datasets.errors import UserError
from pretrain.report.collect import collect


def test_a_run_is_read_as_it_was_written(make_run):
    root = make_run()
    run = collect(root)
    assert (run.name, run.step, run.steps, run.samples, run.finished) == ("alpha", 1000, 1000, 64_000, True)
    assert run.config == yaml.safe_load((root / "run.yaml").read_text())
    records = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/loss/itc", "eval/perplexity"):
        expected = [(each["samples"], each[name]) for each in records if name in each]
        series = run.series[name]
        assert list(zip(series.samples, series.values, strict=True)) == expected
    assert [start.device for start in run.starts] == ["cpu"]
    assert [(sheet.step, sheet.rows[0].said) for sheet in run.sheets] == [
        (500, "a square"),
        (1000, "a red square"),
    ]
    assert run.sheets[-1].rows[0].image.is_file()
    (emoji,) = run.evaluations
    assert (emoji.name, emoji.data, emoji.scores["zero_shot_top1"].chance) == ("emoji", "val/*.tar", 0.1)
    assert emoji.scores["perplexity"].chance is None
    assert run.problems == ()


def test_a_run_that_has_just_begun(make_run):
    root = make_run()
    for name in ("metrics.jsonl", "starts.jsonl", "evaluations/emoji.json"):
        (root / name).unlink()
    for path in (root / "samples").glob("*.json"):
        path.unlink()
    run = collect(root)
    assert (run.step, run.samples, run.finished, run.series) == (0, 0, False, {})
    assert (run.starts, run.sheets, run.evaluations, run.problems) == ((), (), (), ())
    (root / "metrics.jsonl").write_text("")
    assert collect(root) == run


def test_torn_lines_and_nulls_are_left_out(make_run):
    root = make_run()
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1010, "samples": 64640, "train/loss": null, "train/loss/itc": 9.5}\n')
        file.write('{"step": 1020, "samples": 6528')
    run = collect(root)
    assert run.step == 1010
    assert run.last("train/loss/itc") == 9.5
    assert run.series["train/loss"].samples[-1] == 64_000
    assert np.isfinite(run.series["train/loss"].values).all()


def test_more_steps_make_a_finished_run_unfinished(make_run):
    root = make_run()
    text = (root / "run.yaml").read_text()
    (root / "run.yaml").write_text(text.replace("steps: 1000", "steps: 2000"))
    assert not collect(root).finished


def test_of_many_sheets_a_few_are_shown_the_first_and_the_last_among_them(make_run):
    root = make_run()
    content = (root / "samples" / "step-00001000.json").read_text()
    for step in range(1, 41):
        path = root / "samples" / f"step-{step:08d}.json"
        path.write_text(content.replace('"step": 1000', f'"step": {step}'))
    steps = [sheet.step for sheet in collect(root).sheets]
    assert len(steps) == 4
    assert (steps[0], steps[-1]) == (1, 1000)
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"step": 1}', "\udcff", '{"step": "x", "rows": 3, "values": 3}']
)
def test_a_file_that_cannot_be_read_costs_no_more_than_itself(make_run, text):
    root = make_run()
    broken = [root / "samples" / "step-00001000.json", root / "evaluations" / "emoji.json"]
    for path in broken:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    run = collect(root)
    assert [sheet.step for sheet in run.sheets] == [500]
    assert run.evaluations == ()
    assert len(run.problems) == 2
    for path, problem in zip(broken, run.problems, strict=True):
        assert problem.startswith(f"{path} cannot be read: ")


def test_a_sheet_cannot_point_out_of_its_folder_nor_flood_the_page(make_run):
    root = make_run()
    path = root / "samples" / "step-00001000.json"
    sheet = json.loads(path.read_text())
    sheet["rows"][0] |= {"image": "../../../etc/passwd", "said": "x" * 1_000_000, "references": [7]}
    path.write_text(json.dumps(sheet))
    (row,) = collect(root).sheets[-1].rows
    assert row.image == root / "samples" / "images" / "passwd"
    assert len(row.said) < 1000
    assert row.references == ("7",)


def one_sentence(root):
    with pytest.raises(UserError) as caught:
        collect(root)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_what_is_no_run_is_one_sentence(tmp_path, make_run):
    assert "there is no run.yaml" in one_sentence(tmp_path)
    assert str(tmp_path / "nothing") in one_sentence(tmp_path / "nothing")
    root = make_run()
    (root / "run.yaml").write_text("a: [1,\n  2")
    assert "run.yaml cannot be read" in one_sentence(root)
    for text in ("", "words", "stages: 3", "stages: {one: {}}", "stages: {one: {steps: many}}"):
        (root / "run.yaml").write_text(text)
        assert "run.yaml was not written by a run" in one_sentence(root)


@pytest.mark.parametrize("line", ["{", "[1]", '{"step": 5}', '{"step": 5, "samples": null}'])
def test_a_damaged_metrics_file_is_one_sentence(make_run, line):
    root = make_run()
    path = root / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")
    assert "metrics.jsonl is not a metrics file" in one_sentence(root)
