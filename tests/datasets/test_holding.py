"""What a run takes of a sample, and that every choice belongs to the sample's key."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from datasets.classes import Classes
from datasets.holding import GIVES, NEEDS, Holding
from datasets.sample import Fault, Phrase, Sample

LEFT, RIGHT, TOP = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.5)
SAMPLE = Sample(
    key="00000.tar/7",
    image=torch.zeros(3, 2, 2, dtype=torch.uint8),
    captions=("a cat beside a dog", "two animals"),
    phrases=(
        Phrase(text="a cat", box=LEFT),
        Phrase(text="a dog", box=RIGHT),
        Phrase(text="two animals", box=TOP, caption=1),
    ),
    label="cat",
    shard="00000.tar",
    offset=512,
)
CLASSES = Classes(("dog", "cat {}", "cat"), ("a {}.", "the {}, again {}", "many"), source="pets")
KEYS = [(3, epoch, 7) for epoch in range(400)]


def test_all_captions_keep_their_phrases():
    assert Holding(choose="all")(SAMPLE, KEYS[0]) == SAMPLE


def test_one_caption_is_drawn_by_the_key_and_keeps_its_own_phrases():
    found = [Holding()(SAMPLE, key) for key in KEYS]
    assert found == [Holding()(SAMPLE, key) for key in KEYS]
    for one in found:
        place = SAMPLE.captions.index(one.captions[0])
        assert len(one.captions) == 1
        assert [p.text for p in one.phrases] == [p.text for p in SAMPLE.phrases if p.caption == place]
        assert {p.caption for p in one.phrases} == {0}
    assert min(Counter(one.captions for one in found).values()) > 160


def test_seed_epoch_and_index_each_draw_anew():
    """Neighbours in any part of the key are unrelated, and none of them follows from another."""
    for part in range(3):
        keys = [tuple(n if at == part else 5 for at in range(3)) for n in range(200)]
        drawn = [SAMPLE.captions.index(Holding()(SAMPLE, key).captions[0]) for key in keys]
        assert 70 < sum(drawn) < 130


def test_phrases_are_texts_with_their_boxes():
    found = Holding(holds="phrases", choose="all")(SAMPLE, KEYS[0])
    assert found.captions == ("a cat", "a dog", "two animals")
    assert found.boxes == (LEFT, RIGHT, TOP)
    assert [(p.text, p.box, p.caption) for p in found.phrases] == [
        ("a cat", LEFT, 0),
        ("a dog", RIGHT, 1),
        ("two animals", TOP, 2),
    ]
    drawn = Counter((one.captions, one.boxes) for one in (Holding(holds="phrases")(SAMPLE, k) for k in KEYS))
    assert set(drawn) == {(("a cat",), (LEFT,)), (("a dog",), (RIGHT,)), (("two animals",), (TOP,))}
    assert min(drawn.values()) > 90


def test_an_image_whose_phrases_lie_outside_the_view_stays_without_text():
    found = Holding(holds="phrases")(replace(SAMPLE, phrases=(), cut_off=2), KEYS[0])
    assert (found.captions, found.boxes, found.fault) == ((), (), None)
    assert found.image is SAMPLE.image


def test_an_image_that_never_had_a_phrase_is_masked():
    found = Holding(holds="phrases")(replace(SAMPLE, phrases=()), KEYS[0])
    assert found.fault is not None
    assert (found.fault.kind, found.image) == ("no_phrase", None)


def test_a_class_by_name_must_be_among_those_that_were_named():
    holding = Holding(holds="classes", classes=Classes(("Red apple", "pear"), ("a {}",)))
    assert holding(replace(SAMPLE, label="red_apple"), KEYS[0]).captions == ("a red_apple",)
    fault = holding(replace(SAMPLE, label="zebra"), KEYS[0]).fault
    assert fault is not None
    assert (fault.kind, str(fault)) == ("class", "its class 'zebra' is none of the 2 named")


def test_text_and_images():
    assert Holding(holds="text", choose="all")(SAMPLE, KEYS[0]).captions == SAMPLE.captions
    assert len(Holding(holds="text")(SAMPLE, KEYS[0]).captions) == 1
    found = Holding(holds="images")(SAMPLE, KEYS[0])
    assert (found.captions, found.phrases, found.fault) == ((), (), None)
    assert found.image is SAMPLE.image


def test_classes_by_name_and_by_number_are_put_into_sentences():
    holding = Holding(holds="classes", choose="all", classes=CLASSES)
    assert holding(SAMPLE, KEYS[0]).captions == ("a cat.", "the cat, again cat", "many")
    assert holding(replace(SAMPLE, label=0), KEYS[0]).captions == ("a dog.", "the dog, again dog", "many")
    assert holding(replace(SAMPLE, label=1), KEYS[0]).captions[0] == "a cat {}."
    one = Holding(holds="classes", classes=CLASSES)
    drawn = Counter(one(SAMPLE, key).captions for key in KEYS)
    assert sorted(drawn) == [("a cat.",), ("many",), ("the cat, again cat",)]
    assert min(drawn.values()) > 90


@pytest.mark.parametrize(
    ("holding", "without", "kind", "reason"),
    [
        (Holding(), {"captions": ()}, "no_caption", "no caption"),
        (Holding(choose="all"), {"captions": ()}, "no_caption", "no caption"),
        (Holding(holds="text"), {"captions": ()}, "no_caption", "no caption"),
        (Holding(holds="classes", classes=CLASSES), {"label": None}, "class", "no class"),
        (
            Holding(holds="classes", classes=CLASSES),
            {"label": 3},
            "class",
            "its class 3 is none of the 3 that have names",
        ),
    ],
)
def test_what_lacks_the_thing_is_masked_and_says_where_it_lies(holding, without, kind, reason):
    found = holding(replace(SAMPLE, **without), KEYS[0])
    assert found.fault == Fault(kind, reason, "00000.tar", 512)
    assert (found.image, found.captions, found.phrases) == (None, (), ())
    assert found.key == SAMPLE.key


@pytest.mark.parametrize("holds", NEEDS)
def test_a_sample_that_cannot_be_read_stays_as_it_is(holds):
    bad = Sample(key="k", image=None, captions=(), fault=Fault("truncated", "cut"))
    assert Holding(holds=holds, classes=CLASSES)(bad, KEYS[0]) is bad


def test_what_is_given_is_what_is_needed_but_for_the_words_of_classes():
    assert NEEDS.keys() == GIVES.keys()
    assert {holds: GIVES[holds] - NEEDS[holds] for holds in NEEDS if GIVES[holds] != NEEDS[holds]} == {
        "classes": {"text"}
    }
