import json

import pytest


def history(offline):
    """Step -> row, as W&B would show it; pictures and tables are mappings, flattened by the tool."""
    return {record["step"]["num"]: record["item"] for record in offline["history"]}


def plain(row):
    """What a row has that metrics.jsonl has too."""
    ours = {name: value for name, value in row.items() if not name.startswith(("_", "eval/s"))}
    return {**ours, "time": row["_timestamp"]}


def assert_equals_the_truth(offline, truth):
    rows = history(offline)
    assert [record["step"]["num"] for record in offline["history"]] == sorted(truth)
    for step, record in truth.items():
        assert plain(rows[step]) == pytest.approx(record), step


def test_an_offline_run_is_the_run_directory(run, mirror, offline):
    run.report(2, 4)
    run.evaluation(4)
    run.report(6, 8)
    run.evaluation(8, finished=1.0)
    said = mirror()
    assert said.count("\n") == 1
    assert "W&B: offline (no API key): " in said

    found = offline()
    assert_equals_the_truth(found, run.truth)
    (begun,) = found["run"]
    config = begun["config"]["update"]
    assert (begun["project"], begun["display_name"]) == ("medley", "run")
    assert begun["run_id"] == (run.rundir.wandb / "id").read_text()
    assert config["objectives"] == {"itc": {"kind": "itc", "weight": 1}}
    assert config["stages"]["one"]["batch"] == 8
    assert (config["system"]["ranks"], config["system"]["device"]) == (2, "cpu")
    assert found["exit"][0]["exit_code"] == 0

    metrics = {metric.get("name", metric.get("glob_name")): metric for metric in found["metric"]}
    assert metrics["*"]["step_metric"] == "samples"
    assert metrics["samples"]["options"]["hidden"]
    summary = {}
    for each in found["summary"]:
        summary |= each["update"]
    assert summary["eval/zero_shot_top1"] == {"max": 0.25, "last": 0.125}
    assert summary["eval/perplexity"] == {"min": 4, "last": 8}
    assert summary["train/loss"] == {"min": 1.25, "last": 1.25}

    for step in (4, 8):
        row = history(found)[step]
        assert row["eval/samples._type"] == "table-file"
        assert (row["eval/samples.nrows"], row["eval/samples.ncols"]) == (2, 3)
        assert row["eval/sheet._type"] == "image-file"
        (folder,) = run.rundir.wandb.glob("offline-run-*")
        table = json.loads((folder / "files" / row["eval/samples.path"]).read_text())
        assert table["columns"] == ["image", "said", "references"]
        assert [line[1:] for line in table["data"]] == [["said 0", "one\ntwo"], ["said 1", "one\ntwo"]]
        sheet = run.rundir.samples / f"step-{step:08d}.png"
        assert (folder / "files" / row["eval/sheet.path"]).read_bytes() == sheet.read_bytes()
    assert "eval/samples._type" not in history(found)[6]


def test_three_starts_and_a_rewind_are_one_offline_run(run, mirror, offline):
    run.report(2, 4, 6)
    mirror()
    run.resume(6)
    run.report(8, 10)
    run.evaluation(10)
    mirror()
    run.resume(4)  # killed: 6 to 10 are done again
    run.report(6, 8)
    mirror()
    assert_equals_the_truth(offline(), run.truth)
    aside = sorted(path.name for path in (run.rundir.wandb / "superseded").iterdir())
    assert [name[:16] for name in aside] == ["000-offline-run-", "001-offline-run-"]
    assert len(list((run.rundir.wandb / "superseded").rglob("*.wandb"))) == 2, "nothing is deleted"
    assert {name.rpartition("-")[2] for name in aside} == {(run.rundir.wandb / "id").read_text()}
    assert list((run.rundir.wandb / "superseded").rglob("*.png")) == [], "but copies"


def test_damage_in_what_it_reads_does_not_stop_it(run, mirror, offline):
    run.report(2)
    run.evaluation(2)
    run.report(4)
    run.evaluation(4)
    (run.rundir.samples / "step-00000002.json").write_text("{")
    (run.rundir.samples / "step-00000004.png").write_bytes(b"torn")
    run.rundir.starts.unlink()
    truth = run.truth
    with run.rundir.metrics.open("a") as file:
        file.write('{"step": 6, "tim')
    mirror()
    assert_equals_the_truth(offline(), truth)


def test_flags_win_over_the_environment_and_that_over_defaults(run, mirror, offline, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "called")
    run.rundir.metrics.unlink()  # nothing was reported yet
    mirror()
    found = offline()
    assert (found["run"][0]["project"], found["run"][0]["display_name"]) == ("theirs", "called")
    assert "history" not in found
    with run.rundir.run_yaml.open("a") as file:
        file.write("wandb: {mode: offline, project: ours, entity: team, name: named}\n")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert "offline (as asked)" in mirror()
    begun = offline()["run"][0]
    assert (begun["project"], begun["display_name"], begun["entity"]) == ("ours", "named", "team")


MALFORMED = [
    ({"WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid: API key must have 40+ characters, has 5: mend"),
    ({"WANDB_API_KEY": "a" * 40 + " "}, "API key cannot start or end with whitespace: mend"),
    ({"WANDB_BASE_URL": "nonsense"}, "WANDB_BASE_URL: Input should be a valid URL"),
]


@pytest.mark.parametrize(("environment", "sentence"), MALFORMED)
def test_a_malformed_key_or_server_is_a_reason_to_be_offline_and_a_mistake_where_online_is_asked_for(
    run, mirror, offline, monkeypatch, environment, sentence
):
    run.report(2, 4)
    run.evaluation(4)
    with monkeypatch.context() as patch:
        for name, value in {**environment, "WANDB_PROJECT": "theirs"}.items():
            patch.setenv(name, value)
        said = mirror()
        refused = mirror("--mode", "online", code=2)
    assert said.startswith("W&B: offline (W&B refuses its settings, ")
    assert refused.startswith("error: W&B refuses its settings, ")
    assert (said.count("\n"), refused.count("\n")) == (1, 1)
    assert sentence in said
    assert sentence in refused
    found = offline()
    assert_equals_the_truth(found, run.truth)
    assert found["run"][0]["project"] == "theirs"


def test_who_asks_for_offline_needs_no_server(run, mirror, offline, monkeypatch):
    run.report(2)
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_BASE_URL", "nonsense")
        assert "W&B: offline (as asked): " in mirror("--mode", "offline")
    assert_equals_the_truth(offline(), run.truth)


def test_a_project_that_the_environment_spells_wrongly_is_a_sentence(run, mirror, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    said = mirror(code=2)
    assert said.startswith("error: W&B refuses its settings, Invalid project name 'a/b'")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda run: run.rundir.run_yaml.unlink(), "holds no run.yaml of a run: name the directory of one"),
        (lambda run: run.rundir.run_yaml.write_text("- 1"), "holds no run.yaml of a run"),
        (lambda run: run.rundir.run_yaml.write_text("wandb: {mode: disabled}"), "add --mode online"),
        (lambda run: run.rundir.run_yaml.write_text("wandb: {project: a/b}"), "Invalid project name 'a/b'"),
        (lambda run: run.rundir.wandb.write_text("a file"), "cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(run, mirror, prepare, sentence):
    prepare(run)
    said = mirror(code=2)
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert sentence in said
