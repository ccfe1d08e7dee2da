"""The model card: its facts are those of the run, and its code runs as it stands."""

import ast
import dataclasses
import json
from typing import Any

import pytest
import yaml

from datasets.sources import SourceConfig
from pretrain import runfile
from pretrain.evaluate.subject import load_subject
from pretrain.export.__main__ import export
from pretrain.export.card import card, version


def sections(out):
    """Title -> text of README.md, and its header."""
    _, header, body = (out / "README.md").read_text().split("---\n", 2)
    parts = body.split("\n## ")
    return yaml.safe_load(header), {part.split("\n")[0]: part for part in parts[1:]}, parts[0]


def rows(section):
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line
    ]


@pytest.mark.parametrize("to", ["open_clip", "transformers"])
def test_a_card_is_filled_in(make_run, tmp_path, to):
    run, out = make_run("clip"), tmp_path / "mine"
    records = [
        {"step": 1, "samples": 8, "train/loss": 3.0, "eval/zero_shot_top1": 0.25, "eval/perplexity": 9.0},
        {"step": 2, "samples": 16, "eval/zero_shot_top1": 0.51234, "eval/perplexity": None},
        {"step": 4, "samples": 32, "eval/zero_shot_top1": 0.99},  # after the step that is exported
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "evaluations").mkdir()
    found = {"step": 2, "data": "val/*.tar", "values": {"top|1": {"value": 0.5, "chance": 0.1}}}
    (run / "evaluations" / "val.json").write_text(json.dumps(found))
    again = {"step": 2, "data": "scenes", "values": {"zero_shot_top1": {"value": 0.51234, "chance": 0.02}}}
    (run / "evaluations" / "scenes.json").write_text(json.dumps(again))
    export(run, out, to=to)
    header, parts, title = sections(out)
    assert header["library_name"] == to
    assert header["pipeline_tag"] == "zero-shot-image-classification"
    assert {"medley", "clip", "itc"} <= set(header["tags"])
    assert "# mine" in title
    assert f"Medley {version()} (itc) on 16 samples of `scenes`" in title
    header, _, *listed = rows(parts["Data"])
    assert [dict(zip(header, row, strict=True)) for row in listed] == [
        {
            "source": "data",
            "data": "`scenes`",
            "holds": "captions",
            "samples": "drawn without end",
            "fingerprint": "`f00d`",
            "captions of a sample": "one",
        }
    ]
    assert "Evaluated on scenes of their own." in parts["Data"]
    assert rows(parts["Evaluation"])[2:] == [
        ["zero_shot_top1", "0.5123", "0.02", "`scenes`", "2"],
        ["perplexity", "9", "", "`scenes`", "1"],
        ["top&#124;1", "0.5", "0.1", "`val/*.tar`", "2"],
    ]
    assert ["stage0", "2", "8", "32 px", "adamw", "0.003", "0.1"] in rows(parts["Training"])
    assert "0.48145466" in parts["Preprocessing"]
    recipe = parts["Recipe"].split("```yaml\n")[1].split("```")[0]
    (tmp_path / "again.yaml").write_text(recipe)
    place = str(tmp_path), f".../{tmp_path.name}"
    (tmp_path / "here.yaml").write_text(runfile.dump(runfile.load(run / "run.yaml")).replace(*place))
    assert runfile.load(tmp_path / "again.yaml") == runfile.load(tmp_path / "here.yaml")


def test_each_stage_is_told_with_its_own_objectives_as_far_as_it_was_trained(make_run, tmp_path):
    run = make_run("clip", "itc,siglip")
    subject: Any = load_subject(run)
    objectives = dict(subject.run.objectives)
    objectives["siglip"] = dataclasses.replace(objectives["siglip"], weight=((0, 0.0), (8, 1.0)))
    one = dataclasses.replace(subject.run.stages["stage0"], steps=4, objectives={"itc": 0.5})
    two = dataclasses.replace(one, resolution=((0, 32), (3, 64)), objectives={})
    three = dataclasses.replace(one, objectives={"itc": ((0, 2.0), (2, 1.0))})
    subject = with_run(subject, objectives=objectives, stages={"one": one, "two": two, "three": three})

    def tables(step):
        told = card(dataclasses.replace(subject, step=step), run, to="open_clip", out=tmp_path, notes=())
        found = [row[:4] for row in rows(told.split("## Training")[1].split("\n## ")[0])]
        cut = next(place for place, row in enumerate(found) if row[1] == "objective")
        return found[2:cut], found[cut + 2 :], told

    stages, weights, told = tables(3)
    assert stages == [["one", "3", "8", "32 px"]]
    assert weights == [["one", "itc", "itc", "0.5"]]
    assert "(itc) on 24 samples" in told
    assert "siglip" not in told.partition("## Recipe")[0]

    stages, weights, told = tables(10)
    assert stages == [
        ["one", "4", "8", "32 px"],
        ["two", "3", "8", "32 px"],
        ["two", "1", "8", "64 px"],
        ["three", "2", "8", "32 px"],
    ]
    assert weights == [
        ["one", "itc", "itc", "0.5"],
        ["two", "itc", "itc", "1"],
        ["two", "siglip", "siglip", "0.5 at step 4, 1 at step 8"],
        ["three", "itc", "itc", "2 at step 8, 1 at step 10"],
    ]
    assert "(itc + siglip) on 80 samples" in told


def test_every_source_is_told_from_what_was_known_in_training(make_run, tmp_path):
    """The data themselves need not be here any more."""
    run = make_run("clip")
    sources = {
        "pairs": SourceConfig(data="/gone/shards/*.tar", captions="all"),
        "books": SourceConfig(data="books.tar", holds="text"),
    }
    subject: Any = with_run(load_subject(run), sources=sources, val="")
    state = run / "checkpoints" / "step-00000002" / "state.json"
    known = json.loads(state.read_bytes())
    assert known["data"] == {"data": {"fingerprint": "f00d", "size": None}}
    known["data"] = {
        "pairs": {"fingerprint": "f00d", "size": 77},
        "books": {"fingerprint": "b00c", "size": 9},
    }
    state.write_text(json.dumps(known))
    told = card(subject, run, to="open_clip", out=tmp_path / "out", notes=())
    assert rows(told.split("## Data")[1].split("\n## ")[0])[2:] == [
        ["pairs", "`.../shards/*.tar`", "captions", "all", "77", "`f00d`"],
        ["books", "`books.tar`", "text", "one", "9", "`b00c`"],
    ]
    assert "Evaluated on" not in told
    assert "\n\nNot evaluated.\n\n" in told
    state.unlink()  # a run that trains on drops its old checkpoints
    told = card(subject, run, to="open_clip", out=tmp_path / "out", notes=())
    assert "| `books.tar` | text | one | unknown | `unknown` |" in told
    assert str(tmp_path) not in told.partition("## Recipe")[0]


def with_run(subject, **changed):
    return dataclasses.replace(subject, run=dataclasses.replace(subject.run, **changed))


def table(subject, run, out):
    """The evaluations of a card, and the text behind them."""
    text = card(subject, run, to="open_clip", out=out, notes=()).split("## Evaluation")[1].split("\n## ")[0]
    return rows(text)[2:], text


def test_a_file_that_is_no_evaluation_is_named_and_left_out(make_run, tmp_path):
    run = make_run("clip")
    subject, folder = load_subject(run), run / "evaluations"
    folder.mkdir()
    good = {"step": 2, "data": "a.tar", "values": {"top": {"value": 0.5, "chance": None}}}
    odd = {
        "torn": "{", "empty": "", "list": "[]", "without": "{}",
        "flat": json.dumps({**good, "values": {"top": 1}}),
        "word": json.dumps({**good, "values": {"top": {"value": "high", "chance": None}}}),
        "none": json.dumps({**good, "values": None}), "step": json.dumps({**good, "step": None}),
    }  # fmt: skip
    for name, content in odd.items():
        (folder / f"{name}.json").write_text(content)
    found, text = table(subject, run, tmp_path / "out")
    assert found == []
    assert text.startswith("\n\nNot evaluated.\n\n")
    for name in odd:
        assert f"`{name}.json` of the run's evaluations could not be read and is left out." in text
    (folder / "good.json").write_text(json.dumps(good))
    found, text = table(subject, run, tmp_path / "out")
    assert found == [["top", "0.5", "", "`a.tar`", "2"]]
    assert text.count("is left out") == len(odd)


def test_what_was_set_for_an_evaluation_is_told(make_run, tmp_path):
    run = make_run("clip", resolutions=(32, 32))
    subject: Any = load_subject(run)
    folder = run / "evaluations"
    judged = dataclasses.replace(subject.run.eval, limit=64, classes="/abs/my/names.txt")
    subject = with_run(subject, val="val.tar", eval=judged)
    records = [{"step": 2, "eval/top": 0.25, "eval/recall": 0.5}, {"step": 4, "eval/top": 0.75}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    folder.mkdir()
    same = {"step": 4, "data": "val.tar", "limit": 64, "classes": "/abs/my/names.txt", "resolution": 32}
    (folder / "a.json").write_text(json.dumps({**same, "values": {"top": {"value": 0.75, "chance": 0.1}}}))
    other = {"step": 4, "data": "val.tar", "limit": 9, "classes": "", "resolution": 64}
    (folder / "b.json").write_text(json.dumps({**other, "values": {"top": {"value": 1, "chance": None}}}))
    assert table(subject, run, tmp_path / "out")[0] == [
        ["top", "0.75", "0.1", "`val.tar`, its first 64 samples, classes `.../my/names.txt`", "4"],
        ["recall", "0.5", "", "`val.tar`, its first 64 samples, classes `.../my/names.txt`", "2"],
        ["top", "1", "", "`val.tar`, its first 9 samples, 64 px", "4"],
    ]


def test_no_paths_of_this_machine_are_told(make_run, tmp_path):
    run = make_run("clip")
    subject: Any = load_subject(run)
    model = dataclasses.replace(subject.run.model, pretrained="/home/me/w.safetensors")
    data = "/home/me/cc/{0..9}.tar,near/b.tar,/home/me/dir with spaces/{a,b}.tar"
    subject = with_run(subject, sources={"data": SourceConfig(data=data)}, model=model)
    note = "It is read from `/home/me/deep/bert`."
    text = card(subject, run, to="open_clip", out=tmp_path / "new" / ".." / "mine", notes=[note])
    for told in (str(tmp_path), "/home", "me/cc", "Evaluated on"):
        assert told not in text
    shown = ".../cc/{0..9}.tar,near/b.tar,.../dir with spaces/{a,b}.tar"
    assert f"| data | `{shown}` |" in text
    assert f"on 16 samples of `{shown}`" in text
    assert "from `.../me/w.safetensors`" in text
    assert "read from `.../deep/bert`." in text
    assert "\n# mine\n" in text
    assert '"local-dir:mine"' in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["sources"]["data"]["data"] == shown
    subject = with_run(subject, sources={"data": SourceConfig()}, val="https://hub/a/b/c.tar")
    assert "Evaluated on `https://hub/a/b/c.tar`." in card(
        subject, run, to="open_clip", out=tmp_path / "mine", notes=()
    )


@pytest.mark.parametrize(("model", "to"), [("beside clip", "open_clip"), ("clip", "transformers")])
def test_the_code_runs_as_it_stands(make_run, tmp_path, model, to, capsys, monkeypatch):
    run, out = make_run(model), tmp_path / "out"
    export(run, out, to=to)
    monkeypatch.chdir(tmp_path)
    code = sections(out)[1]["Use"].split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    said = ast.literal_eval(capsys.readouterr().out)
    assert set(said) == {"a red square", "a blue circle"}
    assert sum(said.values()) == pytest.approx(1)
