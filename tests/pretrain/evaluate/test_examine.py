"""What can be measured on which data with which model, and what is said where it cannot."""

import math

import pytest
import torch

from datasets.classes import Classes
from datasets.errors import UserError
from datasets.sources import open_source
from pretrain.distributed import Ranks
from pretrain.evaluate.caption import caption_metrics
from pretrain.evaluate.examine import examine
from pretrain.evaluate.observe import observe
from pretrain.evaluate.possible import Examination, plan
from pretrain.testing import untrained_judge

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
RECALLS = {f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
CAPTIONS = {"cider_d", "bleu_1", "bleu_4", "rouge_l"}


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_shard):
    """Sets of images by what is written beside them."""
    folder = tmp_path_factory.mktemp("data")
    kinds = {
        "captions": lambda place, colour: {"captions": [f"a {colour} square", f"number {place}"]},
        "names": lambda place, colour: {"class": colour, "caption": colour},
        "numbers": lambda place, colour: {"class_id": place % 3},
        "both": lambda place, colour: {"class": colour, "caption": f"a {colour} square"},
        "faulty": lambda place, colour: {"class": colour},
    }
    return {
        name: open_source(
            write_shard(folder / f"{name}.tar", 12, beside=beside, damaged=(3,) if name == "faulty" else ()),
            seed=0, split="test",
        )
        for name, beside in kinds.items()
    }  # fmt: skip


def measured(judge, source, **more):
    notes = more.pop("notes", [])
    return examine(judge, Examination(source=source, resolution=32, **more), ranks=ALONE, note=notes.append)


@pytest.mark.parametrize(
    ("kind", "parts", "names"),
    [
        ("captions", {}, RECALLS | CAPTIONS | {"perplexity"}),
        ("captions", {"text": False}, CAPTIONS | {"perplexity"}),
        ("captions", {"captioner": False}, RECALLS),
        ("names", {}, {"zero_shot_top1"}),
        ("both", {}, RECALLS | CAPTIONS | {"perplexity", "zero_shot_top1"}),
    ],
)
def test_by_default_everything_that_is_possible(data, kind, parts, names):
    results = measured(untrained_judge(**parts), data[kind])
    assert set(results) == names


def test_the_values_are_those_of_what_was_observed(data, judge):
    results = measured(judge, data["captions"], measures=("captions", "perplexity"))
    seen = observe(judge, data["captions"], resolution=32, ranks=ALONE)
    assert seen.said is not None
    expected = caption_metrics(seen.said, seen.references)
    assert {name: results[name].value for name in CAPTIONS} == expected
    assert results["perplexity"].value == pytest.approx(math.exp(seen.loss / seen.tokens))


def test_colours_are_learned_by_both_probes(data, judge):
    for kind in ("names", "numbers"):
        results = measured(judge, data[kind], train=data[kind])
        assert results["linear_probe"].value == 1.0
        assert results["nearest_neighbours"].value > 0.9
        assert results["linear_probe"].chance == pytest.approx(1 / 3)


def test_numbers_are_named_by_a_class_file(data, judge):
    classes = Classes(("red", "green", "blue"), ("a {} square",))
    by_number = measured(judge, data["numbers"], classes=classes)
    by_name = measured(judge, data["names"], classes=classes)
    assert by_number == by_name
    assert by_name["zero_shot_top1"].chance == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("kind", "parts", "measure", "sentence"),
    [
        ("captions", {}, "zero_shot", "zero_shot cannot be measured: .*captions.tar holds no class labels"),
        ("names", {}, "retrieval", "retrieval cannot be measured: .*names.tar holds no captions"),
        ("captions", {"text": False}, "retrieval", "this model has no text tower"),
        ("captions", {"captioner": False}, "captions", "this model writes no captions"),
        ("names", {}, "linear_probe", "name them by --train"),
        ("numbers", {}, "zero_shot", "are numbers: name the classes by --classes"),
    ],
)
def test_what_is_asked_for_and_impossible_is_refused(data, kind, parts, measure, sentence):
    with pytest.raises(UserError, match=sentence):
        measured(untrained_judge(**parts), data[kind], measures=(measure,))


def test_where_nothing_is_possible_every_reason_is_given(data):
    with pytest.raises(UserError, match=r"nothing can be measured: .*names\.tar holds no captions.*no text"):
        measured(untrained_judge(text=False), data["names"])


def test_what_cannot_be_read_is_noted(data, judge):
    notes = []
    measured(judge, data["faulty"], notes=notes)
    (note,) = notes
    assert "1 samples of" in note


def test_what_is_left_out_is_said_with_the_reason(data, judge):
    said = plan(judge, Examination(source=data["captions"], resolution=32)).left_out
    assert said == (
        f"not measured: zero_shot, linear_probe, nearest_neighbours ({data['captions'].name} holds no class "
        "labels)",
    )


def test_the_whole_set_is_glanced_at(tmp_path, write_shard, judge):
    """Twenty with classes, then twenty with captions."""

    def beside(place, colour):
        return {"class": colour} if place < 20 else {"caption": f"number {place}"}

    shard = write_shard(tmp_path / "late.tar", 40, beside=beside)
    source = open_source(shard, seed=0, split="test")
    assert {"zero_shot", "retrieval"} <= plan(judge, Examination(source=source, resolution=32)).measures


def test_a_set_that_cannot_be_read_says_why(tmp_path, write_shard, judge):
    shard = write_shard(tmp_path / "odd.tar", 5, beside=lambda place, colour: {"class": 3})
    source = open_source(shard, seed=0, split="test")
    with pytest.raises(
        UserError, match=r"not one of 5 samples of .*odd\.tar can be read .*class is not text"
    ):
        plan(judge, Examination(source=source, resolution=32))


@pytest.mark.parametrize("kind", ["captions"])
def test_classes_and_images_to_learn_from_are_for_labelled_data(data, judge, kind):
    with pytest.raises(UserError, match="holds no class labels"):
        measured(judge, data[kind], classes=Classes(("red", "green"), ("a {}",)))
    with pytest.raises(UserError, match=r"linear_probe cannot be measured: .*holds no class labels"):
        measured(judge, data[kind], train=data["names"])


def test_classes_of_other_data_are_refused_at_a_glance(data, judge):
    examination = Examination(source=data["names"], resolution=32, classes=Classes(("cat",), ("a {}",)))
    with pytest.raises(UserError, match="which is none of the 1 classes"):
        plan(judge, examination)


def test_huge_numbers_are_names_and_one_class_teaches_nothing(tmp_path, write_shard, judge):
    def opened(name, beside):
        shard = write_shard(tmp_path / name, 9, beside=beside)
        return open_source(shard, seed=0, split="test")

    huge = opened("huge.tar", lambda place, colour: {"class_id": 10**9 * (1 + place % 3)})
    assert measured(judge, huge, train=huge)["linear_probe"].chance == pytest.approx(1 / 3)
    one = opened("one.tar", lambda place, colour: {"class": "red"})
    with pytest.raises(UserError, match=r"one\.tar holds fewer than two classes"):
        measured(judge, one, train=one)
