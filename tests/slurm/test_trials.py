"""The runs of a command line and of a sweep, and what is refused before anything is submitted."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from datasets.errors import UserError
from pretrain import runfile
from pretrain.cli import parse
from slurm.request import Request
from slurm.trials import check, frozen, of_stage, trials

SMALL = ["--recipe", "laptop", "--stages.one.steps", "4"]


def test_one_run_has_an_absolute_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (only,) = trials([*SMALL, "--out", "runs/a"], [])
    assert only.out == tmp_path / "runs" / "a"
    (default,) = trials(SMALL, [])
    assert default.out == tmp_path / parse(SMALL).out


def test_a_sweep_is_a_product_with_a_directory_for_each(tmp_path):
    found = trials([*SMALL, "--out", str(tmp_path)], ["stages.one.optim.lr=1e-4,3e-4", "--seed=0,1"])
    assert [trial.out.name for trial in found] == [
        "lr=1e-4_seed=0", "lr=1e-4_seed=1", "lr=3e-4_seed=0", "lr=3e-4_seed=1",
    ]  # fmt: skip
    assert {trial.out.parent for trial in found} == {tmp_path}
    assert [(t.command.run.stages["one"].optim.lr, t.command.run.seed) for t in found] == [
        (1e-4, 0), (1e-4, 1), (3e-4, 0), (3e-4, 1),
    ]  # fmt: skip
    assert found[1].settings == ("stages.one.optim.lr=1e-4", "seed=1")
    for trial in found:
        assert parse(trial.arguments).run == trial.command.run


def test_keys_that_end_alike_are_told_apart(tmp_path):
    (only,) = trials([*SMALL, "--out", str(tmp_path)], ["cadence.report=2", "bad.overall=0.5"])
    assert only.out.name == "report=2_overall=0.5"
    sweep = ["cadence.keep=2,3", "objectives.itc.weight=1", "objectives.lm.weight=2"]
    assert [trial.out.name for trial in trials([*SMALL, "--out", str(tmp_path)], sweep)] == [
        "keep=2_itc.weight=1_lm.weight=2",
        "keep=3_itc.weight=1_lm.weight=2",
    ]


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (["seed"], "is not KEY=VALUE,VALUE"),
        (["seed=1,,2"], "is not KEY=VALUE,VALUE"),
        (["seed=0,1", "seed=2"], "names seed twice: give all its values at once"),
        (["seed=1,01"], r"makes the same run twice \(seed=1 and seed=01\)"),
        (["seed=1,1"], r"makes the same run twice \(seed=1 and seed=1\)"),
        (["out=a,b"], "every run of a sweep has its own directory"),
    ],
)
def test_sweeps_that_are_none(sweep, said, tmp_path):
    with pytest.raises(UserError, match=said):
        trials([*SMALL, "--out", str(tmp_path)], sweep)


def test_what_no_run_can_have_is_refused_with_the_words_of_the_run(capsys):
    with pytest.raises(UserError, match="unknown recipe 'laptp'; did you mean 'laptop'"):
        trials(["--recipe", "laptp"], [])
    with pytest.raises(SystemExit) as left:
        trials(SMALL, ["seeed=1"])
    assert left.value.code == 2
    assert "--seed" in capsys.readouterr().err
    (only,) = trials(SMALL, [])
    with pytest.raises(UserError, match=r"--then three: this run has no stage of that name; it has one"):
        of_stage(only, "three")


def test_ranks_that_lanes_cannot_be_shared_among(tmp_path):
    elastic = ["--deterministic", "elastic", "--stages.one.batch", "64", "--out", str(tmp_path)]
    (only,) = trials([*SMALL, *elastic], [])
    check(only, Request(nodes=2, gpus=0, tasks_per_node=4))
    with pytest.raises(UserError, match=r"shares --shuffle.lanes 8 among 6 ranks"):
        check(only, Request(nodes=2, gpus=3))


def test_a_directory_that_is_another_runs_or_cannot_be_made(tmp_path):
    (only,) = trials([*SMALL, "--out", str(tmp_path / "a")], [])
    check(only, Request())
    run = replace(only.command.run, seed=3)
    (only.out / "run.yaml").write_text(f"# identity: {runfile.identity(run)}\n{runfile.dump(run)}")
    with pytest.raises(UserError, match="belongs to another run: choose another --out, or go on"):
        check(only, Request())
    check(replace(only, command=replace(only.command, allow_changed=True)), Request())
    check(replace(only, command=replace(only.command, run=run)), Request())

    (tmp_path / "file").write_text("")
    (beside,) = trials([*SMALL, "--out", str(tmp_path / "file" / "b")], [])
    with pytest.raises(UserError, match=r"cannot be made \(Not a directory\): choose another --out"):
        check(beside, Request())


def test_a_recipe_that_is_a_file_is_read_from_the_copy(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("from pretrain.recipes.laptop import recipe, recipe as small\n")
    (only,) = trials(["--recipe=laptop", f"--recipe={mine}:small", "--out", str(tmp_path)], [])
    ((name, path),) = only.files(Path("/elsewhere"))
    assert path == mine
    assert frozen(only, Path("/elsewhere"), tmp_path / "code").arguments[-2:] == (
        "--recipe",
        f"{tmp_path / 'code' / name}:small",
    )
    assert only.files(tmp_path) == [("mine.py", mine)]
    (module,) = trials(SMALL, [])
    assert module.files(tmp_path) == []
    assert frozen(module, tmp_path, tmp_path) is module


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("24:00", 1440), ("0:30", 30), ("24:00:00", 1440), ("2-0", 2880), ("1-12", 2160), ("1-06:30", 1830)],
)
def test_times(time, minutes):
    assert Request(gpus=0, time=time).minutes == minutes


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"gpus": 8, "time": "24"}, "--time 24 is no time: write HH:MM, HH:MM:SS or DAYS-HH"),
        ({"gpus": 8, "time": "1:60"}, "--time 1:60 is no time"),
        ({"gpus": 8, "time": "0:00:30"}, "--time 0:00:30 is less than a minute"),
        ({"gpus": 8}, "how long may a segment take"),
        ({"time": "1:00"}, "how many GPUs has a node"),
        ({"gpus": 8, "tasks_per_node": 4, "time": "1:00"}, "leave --tasks-per-node out"),
        ({"gpus": 0, "nodes": 0, "time": "1:00"}, "--nodes is 0; it must be at least 1"),
        ({"gpus": 0, "nodes": 2, "executor": "local"}, "--nodes 2 needs --executor slurm"),
    ],
)
def test_what_cannot_be_asked_for(asked, said, with_sbatch):
    with pytest.raises(UserError, match=said):
        Request(**asked).check()


def test_without_slurm_it_says_what_runs_here(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"no Slurm on this machine \(no sbatch\): submit from a login node"):
        Request(gpus=8, time="1:00").check()
    Request(gpus=8, executor="local").check()


def test_a_slurm_that_is_installed_but_does_not_answer(with_sbatch):
    """Its commands alone are no cluster; what they say of it is not ours to repeat."""
    (with_sbatch / "sinfo").write_text("#!/bin/sh\necho 'sinfo: fatal: no configuration' >&2\nexit 1\n")
    said = r"^no Slurm answers on this machine \(`sinfo` says why\): submit from a login node, or run here"
    with pytest.raises(UserError, match=f"{said} with --executor local$"):
        Request(gpus=8, time="1:00").check()


@pytest.mark.parametrize("then", ["two:nodes", "two:nodes=many", "two:seed=1"])
def test_a_stage_that_follows_with_what_it_needs_otherwise(then, with_sbatch):
    first = Request(gpus=8, nodes=4, time="24:00", then=("two:nodes=16,time=12:00", "three"))
    (two, asked), (three, same) = first.stages()
    assert (two, asked.nodes, asked.minutes, asked.gpus) == ("two", 16, 720, 8)
    assert (three, same.nodes, same.minutes) == ("three", 4, 1440)
    with pytest.raises(UserError, match=f"--then {then}: "):
        Request(gpus=8, time="1:00", then=(then,)).stages()


@pytest.fixture
def with_sbatch(tmp_path, monkeypatch):
    for name in ("sbatch", "srun", "sinfo"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path
