"""What the tables say, and the command. What a browser makes of the page is in test_browser.py."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from datasets.errors import UserError
from pretrain.report import scores
from pretrain.report.__main__ import main
from pretrain.report.collect import Series, collect
from pretrain.report.health import facts, starts, vitals
from pretrain.report.page import write_report
from pretrain.report.words import count, date, duration, score, share

ROOT = Path(__file__).resolve().parents[3]


class Page(HTMLParser):
    """The texts of a page, and its tables as lists of cells."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.tables, self._inside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self._inside.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._inside.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self._inside):
            self.texts.append(data)
        if {"th", "td"} & set(self._inside):
            self.tables[-1][-1][-1] += data


def page_of(*roots):
    return Page(write_report(roots, roots[0] / "report.html").read_text())


def rows_of(element):
    return [["".join(cell.itertext()) for cell in row] for row in element.iter("tr")]


def test_scores_say_the_newest_the_best_and_chance(make_run):
    root = make_run()
    own = {"step": 1000, "data": "scenes", "values": {"zero_shot_top1": {"value": 0.5, "chance": 0.02}}}
    (root / "evaluations" / "scenes.json").write_text(json.dumps(own))
    table = scores.newest([collect(root)])
    assert table is not None
    assert ["".join(block[0].itertext()) for block in scores.elsewhere([collect(root)])] == [
        "emoji val/*.tar"
    ], "what stands in one table is not said again in another"
    # Zero-shot was best at step 500 or 750, which are equally far from its peak; recall and perplexity now.
    assert rows_of(table) == [
        ["", "64,000 samples", "chance"],
        ["zero-shot top1", "0.500best 0.800 at 32,000 samples", "0.020"],
        ["image to text recall@1", "0.865", ""],
        ["perplexity", "1.818", ""],
    ]


def test_scores_of_several_runs_have_their_best_in_bold_and_lower_is_better_for_perplexity(make_run):
    roots = [make_run("a"), make_run("b")]
    path = roots[1] / "evaluations" / "emoji.json"
    values = {"zero_shot_top1": {"value": 0.6, "chance": 0.1}, "perplexity": {"value": 9, "chance": None}}
    path.write_text(json.dumps({"step": 900, "data": "val/*.tar", "values": values}))
    (block,) = scores.elsewhere([collect(root) for root in roots])
    assert rows_of(block) == [
        ["", "astep 1,000", "bstep 900", "chance"],
        ["zero-shot top1", "0.500", "0.600", "0.100"],
        ["perplexity", "7.000", "9.000", ""],
    ]
    bold = [each.text for each in block.iter("span") if each.get("class") == "best"]
    assert bold == ["0.600", "7.000"]


def test_a_run_that_was_not_evaluated_has_an_empty_column(make_run):
    roots = [make_run("a"), make_run("b")]
    (roots[0] / "evaluations" / "emoji.json").unlink()
    (block,) = scores.elsewhere([collect(root) for root in roots])
    assert rows_of(block)[1] == ["zero-shot top1", "", "0.500", "0.100"]


def test_facts_and_vitals(make_run):
    root = make_run()
    at_a_glance = facts(collect(root))
    assert at_a_glance["Samples seen"] == "64,000"
    assert at_a_glance["Wall time"] == "16 min 40 s"
    assert at_a_glance["Objectives"] == "itc, lm"
    assert at_a_glance["Trained on"] == "cpu, 1 process"
    found = vitals(collect(root))
    assert found["samples that could not be read"] == "3 (< 0.1% of those seen)"
    assert found["restarts"] == "none"
    assert found["memory, most, GiB"] == "1.25"
    assert starts(collect(root)) is None


def test_what_reading_cost_is_told_where_it_was_measured(make_run):
    run = collect(make_run())
    assert not {label for label in vitals(run) if "read a part" in label or "lay ready" in label}
    cost = {
        "data/queue": 2.5, "data/read_ms_p50": 0.125, "data/read_ms_p99": 12.0, "data/decode_ms_p50": 3.25,
        "data/cache_hits": 0.5, "data/fetch_ms_p50": 40.0, "data/fetch_ms_p99": 900.0,
        "data/masked/corrupt": 1.0, "data/masked/no_caption": 2.0,
    }  # fmt: skip
    at = run.series["step"].samples
    run.series.update(
        {name: Series(samples=at, values=np.full(len(at), each)) for name, each in cost.items()}
    )
    found = vitals(run)
    assert found["steps that lay ready, median"] == "2.5"
    assert found["ms to read a part of a sample, median and 99th percentile"] == "0.125, 12"
    assert found["ms to decode an image, median"] == "3.25"
    assert found["ms to fetch a range, median and 99th percentile"] == "40, 900"
    assert found["reads found in the cache, median"] == "50.0%"
    masked = found["samples that could not be read"]
    assert masked == "3 (< 0.1% of those seen; no_caption 2; corrupt 1)"


def test_restarts_are_counted_and_listed(make_run):
    root = make_run()
    first = json.loads((root / "starts.jsonl").read_text())
    again = {**first, "time": first["time"] + 700.5, "step": 680, "lost": 20, "ranks": 2}
    with (root / "starts.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    # Nothing was reported between step 600 and this start.
    lines = (root / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not 600 < json.loads(line)["step"] <= 700]
    (root / "metrics.jsonl").write_text("".join(kept))
    run = collect(root)
    assert vitals(run)["restarts"] == "1, 20 steps done again, interrupted for 1 min 40 s"
    assert facts(run)["Trained on"] == "cpu, 2 processes"
    listed = starts(run)
    assert listed is not None
    assert rows_of(listed)[2][1:] == ["680", "20", "1 min 40 s", "2 x cpu"]


def test_a_page_of_several_runs_shows_only_what_differs(make_run):
    roots = [make_run("a"), make_run("b", lr=0.008)]
    (differences,) = [
        table for table in page_of(*roots).tables if ["stages.one.optim.lr", "0.004", "0.008"] in table
    ]
    assert len(differences) == 2
    assert "These runs have the same configuration." in page_of(roots[0], make_run("c")).texts


def test_captions_of_the_first_and_the_last_sheet_stand_side_by_side(make_run):
    tables = page_of(make_run()).tables
    (captions,) = [table for table in tables if table[0][0] == "image"]
    assert captions[0][1:] == [
        "reference",
        "said at step 50032,000 samples",
        "said at step 1,00064,000 samples",
    ]
    assert captions[1][1:] == ["a big red square", "a square", "a red square"]


def test_sections_without_content_are_left_out(make_run):
    root = make_run()
    for name in ("metrics.jsonl", "starts.jsonl", "evaluations/emoji.json"):
        (root / name).unlink()
    for path in (root / "samples").glob("*.json"):
        path.unlink()
    texts = page_of(root).texts
    assert "no report yet" in texts
    assert "There are no curves: nothing that changes was reported yet." in texts
    assert "Configuration" in texts
    assert not {"Loss", "Evaluation", "Samples", "Timing and data health"} & set(texts)


def test_what_could_not_be_read_is_said(make_run):
    root = make_run()
    (root / "evaluations" / "emoji.json").write_text("{")
    assert any("emoji.json cannot be read" in text for text in page_of(root).texts)


def test_runs_of_the_same_name_go_by_their_paths(make_run, tmp_path):
    (tmp_path / "x").mkdir()
    roots = [make_run("a"), make_run("x/a")]
    texts = page_of(*roots).texts
    assert str(roots[0]) in texts
    assert str(roots[1]) in texts


def test_the_command_writes_where_it_is_told_and_says_how_to_do_it_again(make_run, tmp_path, capsys):
    roots = [make_run("a"), make_run("b c")]
    assert main([str(roots[0])]) == 0
    assert capsys.readouterr().out == f"{roots[0] / 'report.html'}\n"
    assert f"python -m pretrain.report {roots[0]}" in page_of(roots[0]).texts
    out = tmp_path / "both.html"
    assert main([*map(str, roots), "--out", str(out)]) == 0
    assert f"python -m pretrain.report {roots[0]} '{roots[1]}' --out {out}" in Page(out.read_text()).texts


def test_mistakes_are_one_sentence_and_exit_code_2(make_run, tmp_path, capsys):
    root, file = make_run(), tmp_path / "file"
    file.write_text("")
    for arguments, words in (
        ([tmp_path], "is not the directory of a run"),
        ([root, "--out", tmp_path], "(it is a directory)"),
        ([root, "--out", file / "below.html"], "(Not a directory)"),
        ([root, "--out", tmp_path / "nowhere" / "a.html"], "(No such file or directory)"),
    ):
        assert main(list(map(str, arguments))) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert words in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alpha", "file"]


def test_the_old_report_stands_if_the_new_one_cannot_be_made(make_run):
    root = make_run()
    before = write_report([root], root / "report.html").read_bytes()
    (root / "run.yaml").write_text("")
    with pytest.raises(UserError):
        write_report([root], root / "report.html")
    assert (root / "report.html").read_bytes() == before


def test_no_heavy_library_is_needed(make_run):
    code = (
        "import sys; from pretrain.report.__main__ import main; main(sys.argv[1:]);"
        "print({'torch', 'matplotlib', 'PIL', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(make_run())]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("\nset()\n")


def test_numbers_in_words():
    assert [count(each) for each in (0, 6400, 999_999, 12_800_000, 1.5e9)] == [
        "0", "6,400", "999,999", "12.8M", "1.5G",
    ]  # fmt: skip
    assert [duration(each) for each in (0, 59.4, 59.6, 3599, 3600, 86_399, 90_000)] == [
        "0 s", "59 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "23 h 59 min", "1 d 1 h",
    ]  # fmt: skip
    assert [score(each) for each in (0.12345, -0.5, 12.3456, 1234.5)] == ["0.123", "-0.500", "12.35", "1234"]
    assert [share(each) for each in (0, 0.00001, 0.001, 0.5)] == ["0.0%", "< 0.1%", "0.1%", "50.0%"]
    assert date(0).startswith(("1970-01-01", "1969-12-31"))
