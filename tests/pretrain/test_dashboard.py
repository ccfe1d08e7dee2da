"""Every panel names a metric that a run reports, and every metric that is reported has a panel."""

import io
import json
import os
import re
import traceback
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from PIL import Image
from webdataset.writer import TarWriter

from datasets.errors import KINDS
from datasets.health import Meter
from pretrain import dashboard, launch, runfile
from pretrain.cli import parse
from pretrain.evaluate import during, scenes
from pretrain.evaluate.sheet import Sheet
from pretrain.health import figures
from pretrain.rundir import RunDir
from pretrain.sinks.jsonl import read

pytestmark = pytest.mark.usefixtures("logged_out")
TINY = (
    "--stages.one.steps 2 --stages.one.batch 8 --stages.one.resolution 32 --vocabulary 300 --model.embed 16 "
    "--model.text.width 16 --model.text.layers 1 --model.captioner.width 16 --model.captioner.layers 1 "
    "--cadence.report 2 --loader-threads 1"
)
NOT_SHOWN = {"step", "time", "samples", "finished", "perf/seconds_left"}
LABELS = [f"thing {label}" for label in range(6)]


def in_child(command, arguments):
    """Run in a fork, which leaves nothing of the client behind; its exit code, and what it wrote."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said, code = io.StringIO(), 70
        try:
            torch.set_num_threads(1)
            with redirect_stdout(said), redirect_stderr(said):
                code = command([str(argument) for argument in arguments])
        except BaseException:
            traceback.print_exc(file=said)
        finally:
            os.write(writing, said.getvalue().encode())
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def write_shard(path, *, labels=LABELS, captioned=True):
    """Images, with a class label where there are labels, and with a caption."""
    with TarWriter(str(path)) as tar:
        for place in range(16):
            stream = io.BytesIO()
            Image.new("RGB", (32, 32), (place * 15, 90, 200 - place * 10)).save(stream, "PNG")
            beside = {"class": labels[place % len(labels)]} if labels else {}
            beside |= {"caption": f"a photo, number {place}"} if captioned else {}
            record = json.dumps(beside).encode()
            tar.write({"__key__": f"{place:09d}", "png": stream.getvalue(), "json": record})


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """What to train and to judge on, by name."""
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "shards.tar")
    write_shard(folder / "labels.tar", captioned=False)
    write_shard(folder / "captions.tar", labels=[])
    write_shard(folder / "few.tar", labels=LABELS[:5])
    return folder


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory, shards):
    """(objectives, data) -> run directory, trained to its end and judged in small."""
    made = {}

    def tiny_run(objectives, data):
        if (objectives, data) not in made:
            out = tmp_path_factory.mktemp("tiny") / "run"
            places = "" if data == "scenes" else f"--data {shards}/shards.tar --val {shards}/{data}.tar"
            arguments = f"--objectives {objectives} {TINY} --out {out} {places}".split()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("WANDB_MODE", "disabled")
                patch.setattr(scenes, "_RETRIEVAL", 8)
                patch.setattr(scenes, "_PER_COMBINATION", 1)
                patch.setattr(scenes, "_CAPTIONED", 2)
                patch.setattr(during, "make_sheet", lambda *_, **__: Sheet(rows=(), said_by="captioner"))
                patch.setattr(during, "save_sheet", lambda *_, **__: None)
                patch.setattr(launch, "show", lambda training: None)
                code, said = in_child(launch.main, arguments)
            assert code == launch.DONE, said
            made[objectives, data] = out
        return made[objectives, data]

    return tiny_run


@pytest.mark.parametrize(
    ("objectives", "data"),
    [
        ("itc,lm", "scenes"),
        ("siglip,words=lm", "shards"),
        ("lm", "scenes"),
        ("itc,itm,lm", "scenes"),
        ("itm", "scenes"),
    ],
)
def test_panels_and_reported_metrics_are_the_same(tiny_run, objectives, data):
    out = tiny_run(objectives, data)
    reported = {name for record in read(out / "metrics.jsonl") for name in record} - NOT_SHOWN
    shown = dashboard.panel_metrics(dashboard.of_run(runfile.load(out / "run.yaml")))
    assert shown == reported, "by the flags alone"


_TOP5 = {"eval/zero_shot_top5"}
_BY_CLASS = {"eval/zero_shot_top1", *_TOP5}
_BY_CAPTION = {f"eval/{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
_OF_CAPTIONS = {f"eval/{name}" for name in ("cider_d", "bleu_1", "bleu_4", "rouge_l", "perplexity")}


@pytest.mark.parametrize(
    ("data", "impossible"),
    [("labels", _BY_CAPTION | _OF_CAPTIONS), ("captions", _BY_CLASS), ("few", _TOP5)],
)
def test_after_an_evaluation_there_are_panels_for_what_was_measured(tiny_run, tmp_path, data, impossible):
    out = tiny_run("itc,lm", data)
    reported = {name for record in read(out / "metrics.jsonl") for name in record} - NOT_SHOWN
    by_flags = dashboard.panel_metrics(dashboard.of_run(runfile.load(out / "run.yaml")))
    assert "data/read_ms_p99" in reported
    assert by_flags - reported == impossible, "a panel of these would be empty for ever"
    file = tmp_path / "dashboard.json"
    assert in_child(dashboard.main, [out, "--dry-run", file])[0] == dashboard.DONE
    sections = json.loads(file.read_text())["spec"]["section"]["panelBankConfig"]["sections"]
    panels = [panel["config"].get("metrics", []) for each in sections for panel in each["panels"]]
    assert {metric for metrics in panels for metric in metrics} == reported


def test_before_the_first_evaluation_nothing_is_measured_and_damage_is_passed_over(tmp_path):
    rundir = RunDir(tmp_path)
    assert dashboard.measured(rundir) == set()
    rundir.metrics.write_text('{"step": 2, "train/loss": 1.0}\n')
    assert dashboard.measured(rundir) == set()
    rundir.metrics.write_text('{"step": 2, "eval/cider_d": 1.0}\nhalf\n{"step": 4, "eval/rouge_l": 0.5}\n{')
    assert dashboard.measured(rundir) == {"eval/cider_d", "eval/rouge_l"}


def test_what_reading_costs_has_its_panels_and_no_others():
    """Against everything that a report can hold of it."""
    seen = {"read": 1.0, "decode": 1.0, "fetch": 1.0}
    meter = Meter()
    for name, seconds in seen.items():
        meter.record(name, seconds)
    for name in ("steps", "queue", "cache_hit", "mended/cut"):
        meter.add(name)
    row = {**meter.take(), "data_wait": 0.0, "seconds": 1.0, "cold": 0.0}
    possible = set(figures([row]))
    assert len(possible) == 11

    def shown(data, measured=()):
        run = parse(f"--objectives itc --data {data}".split()).run
        return dashboard.of_run(run, measured=measured)

    def reading(sections):
        return {name for name in dashboard.panel_metrics(sections) if name.startswith("data/")}

    patterns = [panel.pattern for section in shown("x.tar") for panel in section.panels if panel.pattern]
    by_kind = {name for name in possible if any(re.fullmatch(pattern, name) for pattern in patterns)}
    assert by_kind == {"data/mended/cut"}
    everything = possible - by_kind - {"perf/data_wait"} | {"data/masked"}
    assert reading(shown("https://host/manifest.json")) == everything
    assert reading(shown("a.tar,manifest.json")) == everything, "which may name anything"
    assert reading(shown("manifest.json", {"data/cache_hits"})) == everything
    local = reading(shown("manifest.json", {"data/queue"}))
    assert local == reading(shown("x.tar")) < everything
    assert everything - local == {
        "data/cache_hits", "data/fetch_mib_per_second", "data/fetch_ms_p50", "data/fetch_ms_p99",
    }  # fmt: skip
    assert reading(shown("scenes")) == {"data/queue", "data/masked"}


def test_samples_that_cannot_be_read_have_a_panel_by_kind(tmp_path):
    run = parse(["--objectives", "itc", "--data", "x.tar"]).run
    (bad,) = (each for each in dashboard.of_run(run) if each.name == "Bad data")
    kinds = [f"data/masked/{kind}" for kind in KINDS]
    assert all(any(re.fullmatch(each.pattern, kind) for each in bad.panels) for kind in kinds)
    assert not any(re.fullmatch(each.pattern, "data/masked") for each in bad.panels)


def test_sections_are_those_that_the_run_has_something_for():
    def names(arguments):
        return [section.name for section in dashboard.of_run(parse(arguments.split()).run)]

    whole = names("--objectives itc,lm")
    assert whole == [
        "Losses", "Recall and zero-shot", "Captions", "In training", "Gradient norms",
        "Temperature and learning rate", "Throughput and data wait", "Reading", "Bad data", "Restarts",
    ]  # fmt: skip
    assert names("--objectives itc") == [name for name in whole if name != "Captions"]
    unjudged = names("--objectives itc,lm --data x.tar")
    assert unjudged == [name for name in whole if name not in ("Captions", "Recall and zero-shot")]
    assert names("--objectives itc,lm --data x.tar --val y.tar") == whole


def test_dry_run_writes_what_would_be_saved(tiny_run, tmp_path):
    out = tiny_run("itc,lm", "scenes")
    file = tmp_path / "dashboard.json"
    assert in_child(dashboard.main, [out, "--dry-run", file]) == (dashboard.DONE, f"{file}\n")
    spec = json.loads(file.read_text())
    assert spec["project"] == "medley"
    section = spec["spec"]["section"]
    assert section["settings"]["xAxis"] == "samples"
    written = section["panelBankConfig"]["sections"]
    shown = dashboard.of_run(runfile.load(out / "run.yaml"))
    assert [each["name"] for each in written] == [each.name for each in shown]
    plots = [panel["config"] for each in written for panel in each["panels"] if "metrics" in panel["config"]]
    assert {plot["xAxis"] for plot in plots} == {"samples"}
    assert {metric for plot in plots for metric in plot["metrics"]} == dashboard.panel_metrics(shown)
    kinds = [panel["viewType"] for each in written if each["name"] == "Captions" for panel in each["panels"]]
    assert kinds[-2:] == ["Media Browser", "Weave"]


def test_a_mistake_is_one_sentence_and_code_2(tiny_run, tmp_path, monkeypatch):
    out = tiny_run("itc,lm", "scenes")

    def refused(*arguments):
        code, said = in_child(dashboard.main, arguments)
        assert code == dashboard.USER_ERROR
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    assert "holds no run.yaml of a run" in refused(tmp_path)
    assert "needs an API key: wandb login, or --dry-run FILE" in refused(out)
    assert "cannot be written: No such file" in refused(out, "--dry-run", tmp_path / "no" / "file")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert "WANDB_API_KEY invalid: API key must have 40+ characters, has 5: mend" in refused(out)
    file = tmp_path / "file"
    assert in_child(dashboard.main, [out, "--dry-run", file])[0] == dashboard.DONE, "which needs no key"
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "nonsense")
    assert "WANDB_BASE_URL: Input should be a valid URL" in refused(out)
    assert "WANDB_BASE_URL: Input should be a valid URL" in refused(out, "--dry-run", file)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer" in refused(out)
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    assert "pip install -e '.[dashboards]'" in refused(out)
