"""What `--plan` prints, of data that are here and of data that are not, and what it refuses."""

import re
from pathlib import Path

import pytest

from pretrain import launch
from pretrain.plan.gpus import GPUS, gpu_called
from pretrain.plan.leg import _further
from pretrain.plan.trial import Found

TINY = [
    *("--model.embed", "16", "--model.text.width", "16", "--model.text.layers", "1"),
    *("--model.captioner.width", "16", "--model.captioner.layers", "1", "--vocabulary", "300"),
]


def planned(capsys, *arguments: str) -> dict[str, list[str]]:
    """The cells of each line by its name; of a name that comes twice, the last."""
    assert launch.main(["--plan", *arguments]) == launch.DONE
    rows = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    return {name: cells for name, *cells in rows}


def refused(capsys, *arguments: str) -> str:
    assert launch.main(["--plan", *arguments]) == launch.USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_recipe_of_two_stages_is_planned_without_data(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = planned(capsys, "--recipe", "stages:small", *TINY, "--gpus", "4", "--pairs", "1e5")
    assert rows["parameters, of which train"] == []
    assert rows["batch"] == ["64", "32", "32"]
    assert rows["samples"] == ["38,400", "3,840", "3,840"]
    assert rows["passes over the data"] == ["0.384", "0.0384", "0.0384"]
    assert rows["micro-batches x samples a GPU"] == ["1 x 16", "1 x 8", "2 x 4"]
    gigaflops = [float(cell) for cell in rows["GFLOP a sample"]]
    assert gigaflops[0] == gigaflops[1] < gigaflops[2]
    hours, of_gpus = ([float(cell) for cell in rows[name]] for name in ("hours", "GPU-hours"))
    assert of_gpus == pytest.approx([4 * each for each in hours], rel=1e-2)
    assert not list(tmp_path.iterdir()), "nothing is made"


def test_of_data_that_are_here_captions_are_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = planned(capsys, "--recipe", "laptop", *TINY, "--gpus", "1", "--gpu", "a100-40")
    assert any("as 512 captions of the data are" in row for row in rows)
    assert "passes over the data" in rows
    assert not any("fsdp" in row for row in rows), "one GPU has no others"
    assert any(
        "--stages.one.optim.kind muon" in row
        for row in planned(capsys, "--recipe", "laptop", *TINY, "--gpus", "2")
    )


def test_a_stage_reads_its_own_sources_by_their_weights(capsys):
    recipe = str(Path(__file__).parents[1] / "three_stages.py")
    rows = planned(capsys, "--recipe", recipe, "--gpus", "2", "--pairs", "1000", "--caption-tokens", "9")
    # 500 pairs a source; stage one reads `pairs` alone, two 3 to 1 and on to 3 to 3, three both alike.
    assert rows["samples"] == ["96", "128", "64", "64"]
    assert rows["passes over pairs"][0] == "0.192"
    assert rows["passes over more"][0] == "0"
    assert rows["passes over pairs"][3] == rows["passes over more"][3] == "0.064"
    assert float(rows["passes over more"][1]) == pytest.approx(128 * 0.3 / 500, rel=0.05)
    assert rows["text tokens"] == ["144", "288", "144", "144"]


def test_micro_batches_that_are_rounded_up_are_divided_by_what_ran(capsys):
    recipe = str(Path(__file__).parents[1] / "three_stages.py")
    arguments = ("--recipe", recipe, "--stage", "three", "--pairs", "1000", "--caption-tokens", "9")
    few = planned(capsys, *arguments, "--gpus", "16", "--shuffle.lanes", "16", "--gpus-per-node", "16")
    many = planned(capsys, *arguments, "--gpus", "8", "--shuffle.lanes", "8")
    assert few["micro-batches x samples a GPU"] == ["1 x 1"], "one of each of two sources is run"
    assert float(few["GFLOP a sample"][0]) == pytest.approx(float(many["GFLOP a sample"][0]), rel=1e-3)


def test_only_the_stage_that_is_named_is_planned_and_sending_holds_it_up(capsys):
    arguments = ["--recipe", "stages:small", *TINY, "--gpus", "16", "--pairs", "1e5", "--stage", "one"]
    rows = planned(capsys, *arguments)
    assert rows["samples"] == ["38,400"]
    sent = [cells[0] for name, cells in rows.items() if ", between machines" in name]
    sending = sum(float(re.findall(r"\(([\d.]+) ms", cell)[0]) for cell in sent)
    assert float(rows["ms a step"][0]) == pytest.approx(sending, rel=0.02)
    assert any(name.startswith("the network holds up one, ") for name in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "clip"], "--pairs 1.5e9"),
        (["--recipe", "clip", "--pairs", "4e8", "--gpu", "h20"], "did you mean h200?"),
        (["--recipe", "clip", "--pairs", "4e8", "--gpus", "12"], "whole machines"),
        (["--recipe", "clip", "--pairs", "4e8", "--gpus", "24"], "take a batch of 32760"),
        (["--recipe", "clip", "--pairs", "4e8", "--stages.one.micro-batches", "3"], "micro-batches 3"),
        (["--recipe", "clip", "--pairs", "many"], "--pairs many is not a number"),
        (["--recipe", "clip", "--pairs", "4e8", "--utilisation", "30"], "a share"),
        (["--recipe", "laptop", "--deterministic", "elastic", "--gpus", "4"], "plan for --gpus 1"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


def test_flags_of_a_plan_need_one(capsys):
    assert launch.main(["--gpus", "8"]) == launch.USER_ERROR
    assert capsys.readouterr().err == "error: --gpus belongs to --plan, which is not there\n"


def test_every_gpu_is_faster_inside_a_machine():
    assert all(gpu_called(name).node > gpu_called(name).network for name in GPUS)


def test_more_micro_batches_follow_from_two_and_three():
    def found(pieces: int) -> Found:
        return Found(
            flops={"forward": 5 * pieces + 2 * pieces**2},
            bytes={"activations": 100 + 7 * pieces},
            sent={("features", "node"): 3 * pieces},
            parts={},
            image_tokens=1,
            kept={},
        )

    assert _further(found(2), found(3), 9) == found(9)


def test_parameters_that_are_kept_in_bf16_take_half(capsys):
    arguments = ["--recipe", "stages:small", *TINY, "--gpus", "1", "--pairs", "1e5", "--stage", "one"]
    whole = planned(capsys, *arguments)["GB"]
    assert float(planned(capsys, *arguments, "--precision.parameters", "bf16")["GB"][0]) == pytest.approx(
        float(whole[0]) / 2, rel=0.05
    )
