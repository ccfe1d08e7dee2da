import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.annotations import LONGEST, Annotations, annotated
from datasets.errors import ContentError
from datasets.sample import Phrase


def record(**fields):
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("text", "fields", "captions"),
    [
        (b"from txt", None, ("from txt",)),
        (b"from txt", {"captions": ["one", "two"], "caption": "three"}, ("one", "two")),
        (b"from txt", {"caption": "three"}, ("three",)),
        (b"from txt", {"captions": [], "caption": None}, ("from txt",)),
        (None, {"caption": "three"}, ("three",)),
    ],
)
def test_where_captions_come_from(text, fields, captions):
    assert annotated(text, None if fields is None else record(**fields)) == Annotations(
        captions=captions, phrases=(), label=None
    )


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  two\n spaces \t and\r\nlines  ", "two spaces and lines"),
        ("nul\0 and \x1b[31mescape\x7f", "nul and [31mescape"),
        ("\ufeffmarked", "marked"),
        ("no\u00a0break", "no break"),
        ("family 👩\u200d👩\u200d👧 עברית", "family 👩\u200d👩\u200d👧 עברית"),
        ("x" * (LONGEST + 5), "x" * LONGEST),
    ],
)
def test_cleaning(raw, cleaned):
    assert annotated(raw.encode(), None).captions == (cleaned,)


@pytest.mark.parametrize(
    ("text", "data", "reason"),
    [
        (None, b"{}", "no caption"),
        (b"", None, "caption 0 is empty"),
        (b" \0\n", None, "caption 0 is empty"),
        (None, record(captions=["fine", " "]), "caption 1 is empty"),
        (b"caf\xe9", None, r"its \.txt is not UTF-8 \(byte 3\)"),
        (None, b'{"caption": "caf\xe9"}', r"its \.json is not UTF-8"),
        (b"fine", b'{"caption": ', r"its \.json is not JSON"),
        (b"fine", b"[" * 100_000, r"its \.json is not JSON"),
        (b"fine", b"[1]", r"its \.json is not an object"),
        (None, record(caption=7), "caption 0 is not text"),
        (None, record(captions=["fine", None]), "no caption"),
        (None, b'{"caption": "half \\ud83d a pair"}', "caption 0 is not Unicode"),
        (b"fine", record(boxes={}) + b" ", None),
        (b"fine", record(boxes="none"), "its boxes are not a list"),
    ],
)
def test_broken_rules_are_named(text, data, reason):
    if reason is None:
        assert annotated(text, data).captions == ("fine",)
        return
    with pytest.raises(ContentError, match=reason):
        annotated(text, data)


def test_phrases():
    boxes = [
        {"phrase": " A  dog", "box_xyxy": [0, 0.25, 0.5, 1], "caption_index": 1, "n_boxes": 1},
        {"phrase": "grass", "box_xyxy": [0, 0, 1, 1]},
    ]
    found = annotated(None, record(captions=["green grass", "A dog"], boxes=boxes))
    assert found.captions == ("green grass", "A dog")
    assert found.phrases == (
        Phrase(text="A dog", box=(0, 0.25, 0.5, 1), caption=1),
        Phrase(text="grass", box=(0, 0, 1, 1), caption=0),
    )


@pytest.mark.parametrize(
    ("fields", "cls", "label"),
    [
        ({"class": " T-shirt ", "class_id": 3}, b"4", "T-shirt"),
        ({"class_id": 3}, b"4", 3),
        ({}, b"4\n", 4),
        ({}, None, None),
    ],
)
def test_where_a_class_comes_from(fields, cls, label):
    assert annotated(b"text", record(**fields), cls).label == label


def test_what_has_a_class_needs_no_caption():
    assert annotated(None, None, b"4") == Annotations(captions=(), phrases=(), label=4)


@pytest.mark.parametrize(
    ("fields", "cls"),
    [({"class_id": -1}, None), ({"class_id": True}, None), ({"class_id": "3"}, None), ({}, b"x"), ({}, b"")],
)
def test_classes_that_are_none(fields, cls):
    with pytest.raises(ContentError, match="its class is not a number"):
        annotated(b"text", record(**fields), cls)


@pytest.mark.parametrize(
    "box",
    [
        7,
        {},
        {"phrase": "x"},
        {"phrase": "x", "box_xyxy": 5},
        {"phrase": "x", "box_xyxy": [0, 0, 1]},
        {"phrase": "x", "box_xyxy": [0, 0, 1, 1.2]},
        {"phrase": "x", "box_xyxy": [0.6, 0, 0.5, 1]},
        {"phrase": "x", "box_xyxy": [0, 0, float("nan"), 1]},
        {"phrase": "x", "box_xyxy": ["0", 0, 1, 1]},
        {"phrase": "x", "box_xyxy": [0, 0, 1, 1], "caption_index": 1},
        {"phrase": "x", "box_xyxy": [0, 0, 1, 1], "caption_index": -1},
    ],
)
def test_boxes_that_are_none(box):
    with pytest.raises(ContentError, match="box 0 is not x0, y0, x1, y1"):
        annotated(b"fine", record(boxes=[box]))


def test_phrase_without_words():
    with pytest.raises(ContentError, match="phrase 0 is empty"):
        annotated(b"fine", record(boxes=[{"phrase": " ", "box_xyxy": [0, 0, 1, 1]}]))


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["phrase", "box_xyxy", "caption_index", "x"]), x), max_leaves=8)  # fmt: skip  # noqa: E501


@given(captions=JSON, caption=JSON, boxes=JSON)
def test_any_json_gives_captions_or_a_reason(captions, caption, boxes):
    try:
        found = annotated(b"text", record(captions=captions, caption=caption, boxes=boxes)).captions
    except ContentError:
        return
    assert found
    assert all(isinstance(one, str) and one for one in found)
