"""The model card: its facts are those of the run, and its code runs as it stands."""

import ast
import json

import pytest
import yaml

from datasets.scenes import Scenes
from pretrain import runfile
from pretrain.export.__main__ import export
from pretrain.export.card import version


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
    assert dict(row[:2] for row in rows(parts["Data"])[2:]) == {
        "trained on": "`scenes`",
        "samples": "drawn without end, but the data have changed since",
        "fingerprint": "`f00d`",
        "captions of a sample": "one",
        "evaluated on": "scenes of their own",
    }
    assert rows(parts["Evaluation"])[2:] == [
        ["zero_shot_top1", "0.5123", "0.02", "`scenes`", "2"],
        ["perplexity", "9", "", "`scenes`", "1"],
        ["top&#124;1", "0.5", "0.1", "`val/*.tar`", "2"],
    ]
    assert ["stage0", "2", "8", "32 px", "adamw", "0.003", "0.1"] in rows(parts["Training"])
    assert "0.48145466" in parts["Preprocessing"]
    recipe = parts["Recipe"].split("```yaml\n")[1].split("```")[0]
    (tmp_path / "again.yaml").write_text(recipe)
    assert runfile.load(tmp_path / "again.yaml") == runfile.load(run / "run.yaml")


def test_data_that_are_there_and_data_that_are_gone(make_run, tmp_path, monkeypatch):
    run = make_run("clip")
    scenes = Scenes(size=77)
    monkeypatch.setattr("pretrain.export.card.open_source", lambda *_, **__: scenes)
    export(run, tmp_path / "a", to="open_clip")
    assert "| samples | 77, but" in (tmp_path / "a" / "README.md").read_text()
    state = run / "checkpoints" / "step-00000002" / "state.json"
    assert "f00d" in state.read_text()

    def gone(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr("pretrain.export.card.open_source", gone)
    export(run, tmp_path / "b", to="open_clip")
    card = (tmp_path / "b" / "README.md").read_text()
    assert "| samples | unknown: the data were not here any more" in card
    assert "Not yet: `python -m pretrain.evaluate" in card


@pytest.mark.parametrize(("model", "to"), [("beside clip", "open_clip"), ("clip", "transformers")])
def test_the_code_runs_as_it_stands(make_run, tmp_path, model, to, capsys):
    run, out = make_run(model), tmp_path / "out"
    export(run, out, to=to)
    code = sections(out)[1]["Use"].split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    said = ast.literal_eval(capsys.readouterr().out)
    assert set(said) == {"a red square", "a blue circle"}
    assert sum(said.values()) == pytest.approx(1)
