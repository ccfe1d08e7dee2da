from pathlib import Path

import pytest

from datasets.errors import UserError
from datasets.sources import SourceConfig
from objectives.itc import ITC
from objectives.lm import LM
from objectives.siglip import SigLIP
from pretrain import cli, runfile
from pretrain.recipes import laptop
from pretrain.zoo.models import OpenClipConfig


def parsed(line: str) -> cli.Command:
    return cli.parse(line.split())


def test_objectives_by_name_weight_and_flag():
    run = parsed("--objectives itc:1,lm:2").run
    assert run.objectives == {"itc": ITC.Config(weight=1.0), "lm": LM.Config(weight=2.0)}
    run = parsed("--objectives itc,lm --objectives.lm.weight 2").run
    assert run.objectives["lm"].weight == 2.0
    run = parsed("--objectives siglip,again=siglip:0.5").run
    assert run.objectives == {"siglip": SigLIP.Config(), "again": SigLIP.Config(weight=0.5)}


def test_a_weight_may_be_points_of_a_line():
    run = parsed("--objectives lm --objectives.lm.weight 0 0.0 100 1.0").run
    assert run.objectives["lm"].weight == ((0, 0.0), (100, 1.0))


def test_data_without_a_name_is_the_recipes_only_source():
    assert parsed("--data x.tar").run.sources == {"data": SourceConfig(data="x.tar")}
    assert parsed("--data x.tar --data y.tar").run.data == "y.tar"
    assert parsed("--objectives itc").run.sources == {"data": SourceConfig()}


def test_sources_by_name_have_flags_of_their_own():
    run = parsed(
        "--objectives itc,lm --data pairs=a/*.tar,b=c/*.tar --data books=x.json --sources.books.holds text "
        "--sources.books.weight 0 0.0 100 2.0 --sources.books.objectives lm --sources.pairs.captions all "
        "--pool all --shuffle.lanes 4 --shuffle.window 4096 --bad.overall 0.1 --remote.cache 2"
    ).run
    assert run.sources == {
        "pairs": SourceConfig(data="a/*.tar,b=c/*.tar", captions="all"),
        "books": SourceConfig(data="x.json", holds="text", weight=((0, 0.0), (100, 2.0)), objectives=("lm",)),
    }
    assert (run.pool, run.shuffle.lanes, run.shuffle.window) == ("all", 4, 4096)
    assert (run.bad.overall, run.remote.cache) == (0.1, 2)


def test_a_mixture_of_a_recipe_is_kept_where_a_name_is(tmp_path):
    line = "--data pairs=a.tar --data books=b.tar --sources.books.holds text --sources.books.weight 0.25"
    path = tmp_path / "run.yaml"
    path.write_text(runfile.dump(parsed(line).run))
    assert parsed(f"--recipe {path}").run == parsed(line).run
    again = parsed(f"--recipe {path} --data books=c.tar --data more=d.tar").run
    assert again.sources == {
        "books": SourceConfig(data="c.tar", holds="text", weight=0.25),
        "more": SourceConfig(data="d.tar"),
    }


def test_leave_to_change_is_no_part_of_the_run():
    one, other = parsed("--objectives itc"), parsed("--objectives itc --allow-changed")
    assert (one.allow_changed, other.allow_changed) == (False, True)
    assert (one.run, one.out) == (other.run, other.out)


def test_the_last_of_two_flags_wins_and_dicts_have_flags():
    run = parsed("--stages.one.steps 5 --stages.one.optim.lr 1e-4 --stages.one.steps 99").run
    assert run.stages["one"].steps == 99
    assert run.stages["one"].optim.lr == 1e-4


def test_a_model_is_chosen_before_its_flags_are_read():
    run = parsed("--model open_clip:ViT-B-32 --model.pretrained there.safetensors").run
    assert run.model == OpenClipConfig(name="ViT-B-32", pretrained="there.safetensors")


def test_the_same_command_has_the_same_directory_whatever_its_budget():
    one, more, other = (
        parsed(line).out
        for line in (
            "--objectives itc",
            "--objectives itc --stages.one.steps 7 --cadence.report 3",
            "--objectives itc --seed 1",
        )
    )
    assert one == more
    assert one != other
    assert one.parent.name == "runs"
    assert one.name.startswith("itc-")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--objectives itc,lmm", "unknown objective 'lmm'; did you mean 'lm'"),
        ("--objectives itc:heavy", "the weight in 'itc:heavy' is not a number"),
        ("--objectives itc,itc", "names 'itc' twice"),
        ("--objectives ,", "is not KIND"),
        ("--recipe laptp", "unknown recipe 'laptp'; did you mean 'laptop'"),
        ("--recipe clip", "this recipe names no data"),
        ("--recipe laptop:tiny", "recipe laptop has no tiny"),
        ("--recipe nowhere.py", "there is no recipe file nowhere.py"),
        ("--recipe nowhere.yaml", "nowhere.yaml cannot be read"),
        ("--model dua", "unknown model 'dua'; did you mean 'dual'"),
        ("--model dual:large", "dual takes no name"),
        ("--stages.one.batch 0", "--stages.one.batch is 0; it must be at least 1"),
        ("--stages.one.steps -3", "--stages.one.steps is -3"),
        ("--stages.one.batch 2 --stages.one.micro-batches 3", "too few samples for 3 micro-batches"),
        ("--stages.one.optim.lr nan", "--stages.one.optim.lr is nan"),
        ("--stages.one.optim.lr -1", "--stages.one.optim.lr is -1.0"),
        ("--cadence.report 0", "--cadence.report is 0"),
        (
            "--eval.limit 9",
            "is for --val, and scenes have test sets of their own: leave it out",
        ),
        (
            "--val scenes --data a.tar --eval.classes imagenet",
            "--eval.classes imagenet is for --val",
        ),
        ("--data a.tar --eval.limit 9", "is for --val, of which there is none: name one, or leave it out"),
        (
            "--eval.rerank 8",
            "needs an objective that tells matching pairs from others: add one",
        ),
        ("--eval.rerank -1", "--eval.rerank is -1; it must be at least 0"),
        ("--cadence.keep 1", "--cadence.keep is 1; it must be at least 2"),
        ("--loader-threads 0", "--loader-threads is 0"),
        ("--seed -1", "--seed is -1"),
        ("--precision.threads -3", "--precision.threads is -3"),
        ("--model.text.context-length 1", "--model.text.context-length is 1"),
        ("--model.captioner.hidden -1", "--model.captioner.hidden is -1"),
        ("--model.text.heads 3", "--model.text.heads is 3; it must divide --model.text.width"),
        ("--objectives train=itc", "cannot be called 'train'"),
        ("--objectives lm:nan", "--objectives.lm.weight is nan"),
        ("--objectives lm:-1", "--objectives.lm.weight is -1"),
        ("--objectives itc --objectives.itc.smoothing 2", "--objectives.itc.smoothing is 2"),
        ("--objectives lm --objectives.lm.weight 500 1.0 0 0.0", "with rising steps"),
        ("--recipe clip:Run", "recipe clip has no Run"),
        ("--sources.data.weight -1", "--sources.data.weight is -1"),
        ("--sources.data.weight 5 1.0 0 1.0", "--sources.data.weight needs STEP VALUE points with rising"),
        ("--sources.data.weight 0", "no source has a weight above zero at step 0"),
        ("--data a=x --data b=y --sources.a.weight 0 1.0 9 0.0 --sources.b.weight 0", "above zero at step 9"),
        ("--sources.data.objectives mlm", "names 'mlm', which this run does not have; it has itc, lm"),
        ("--sources.data.classes names.txt", "classes belongs to --sources.data.holds classes, and that is"),
        ("--shuffle.lanes 0", "--shuffle.lanes is 0"),
        ("--shuffle.lanes 9 --shuffle.window 8", "--shuffle.window is 8; it must be at least the 9 lanes"),
        ("--allow-change", "unknown flag --allow-change; did you mean --allow-changed"),
        ("--objectivs itc", "unknown flag --objectivs; did you mean --objectives"),
    ],
)
def test_a_mistake_is_one_sentence(line, sentence):
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")) as raised:
        parsed(line)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("line", ["--objectives itc,itm --eval.rerank 8", "--objectives itc --eval.rerank 0"])
def test_answers_are_put_into_a_new_order_by_what_was_trained_to(line):
    assert parsed(line).run.eval.rerank in (0, 8)


@pytest.mark.parametrize(
    ("line", "right"),
    [("--stages.one.stepz 3", "--stages.one.steps"), ("--loader-thread 1", "--loader-threads")],
)
def test_an_unknown_flag_ends_with_code_2_and_a_suggestion(line, right, capsys):
    with pytest.raises(SystemExit) as raised:
        parsed(line)
    assert raised.value.code == 2
    assert right in capsys.readouterr().err


def test_a_recipe_is_a_function_in_any_file(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from dataclasses import replace\n"
        "from pretrain.recipes.laptop import recipe as base\n"
        "def recipe():\n    return replace(base(), seed=11)\n"
        "def small():\n    return replace(base(), seed=12)\n"
    )
    assert parsed(f"--recipe {mine}").run.seed == 11
    assert parsed(f"--recipe {mine}:small --seed 13").run.seed == 13
    assert parsed(f"--recipe {mine}").out.name.startswith("mine-")


def test_run_yaml_gives_the_same_run(tmp_path):
    line = "--objectives itc:2,again=siglip --objectives.itc.weight 0 0.0 9 1.0 --stages.one.batch 32"
    run = parsed(line).run
    path = tmp_path / "run.yaml"
    path.write_text(runfile.dump(run))
    assert runfile.load(path) == run
    assert parsed(f"--recipe {path}").run == run
    assert "kind: siglip" in path.read_text()
    assert "!" not in path.read_text()


def edited(tmp_path, before: str, after: str):
    text = runfile.dump(laptop.recipe())
    assert before in text
    path = tmp_path / "run.yaml"
    path.write_text(text.replace(before, after))
    return path


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("seed: 0", "seeds: 0", "unknown key 'seeds'; did you mean 'seed'"),
        ("seed: 0", "seed: zero", "seed: expected int, found 'zero'"),
        ("kind: lm", "kind: lmm", "unknown objective 'lmm'"),
        ("kind: dual", "kind: nothing", "unknown model 'nothing'"),
        ("captions: one", "captions: few", "captions: expected"),
        ("seed: 0", "seed: !!python/object/apply:os.getpid []", "cannot be read as a run"),
        ("seed: 0", "seed: true", "seed: expected int, found True"),
    ],
)
def test_a_run_yaml_with_a_mistake_names_it(tmp_path, before, after, sentence):
    with pytest.raises(UserError, match=sentence) as raised:
        runfile.load(edited(tmp_path, before, after))
    assert "\n" not in str(raised.value)


def test_every_recipe_is_a_run():
    folder = Path(cli.__file__).parent / "recipes"
    names = sorted(path.stem for path in folder.glob("[a-z]*.py"))
    assert {"clip", "laptop"} <= set(names)
    for name in names:
        assert parsed(f"--recipe {name} --data scenes").out.name.startswith(name)
    assert parsed("--recipe clip --data x.tar").run.stages["one"].batch == 32_768
    assert list(parsed("--recipe clip:small").run.objectives) == ["itc"]
