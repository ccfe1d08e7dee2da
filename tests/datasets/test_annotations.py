import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.annotations import LONGEST, Annotations, annotated
from datasets.errors import KINDS, ContentError, Kind
from datasets.sample import Phrase
from datasets.source import Field

IMAGE: frozenset[Field] = frozenset(("image",))
TEXT: frozenset[Field] = frozenset(("text",))
BOXES: frozenset[Field] = frozenset(("boxes",))
LABEL: frozenset[Field] = frozenset(("label",))
KEPT = "family 👩\u200d👩\u200d👧 e\u0301 \u202eעבר\u202c"


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
    ("raw", "cleaned", "mended"),
    [
        ("  two\n spaces \t and\r\nlines  ", "two spaces and lines", ()),
        ("nul\0 and \x1b[31mescape\x7f", "nul and [31mescape", ("control",)),
        ("\ufeffmarked", "marked", ()),
        ("no\u00a0break", "no break", ()),
        (KEPT, KEPT, ()),
        ("a &lt;b&gt; &amp; c", "a &lt;b&gt; &amp; c", ()),
        ("x" * LONGEST, "x" * LONGEST, ()),
        ("x" * 2**20, "x" * LONGEST, ("cut",)),
        ("\0" + "x" * LONGEST, "x" * (LONGEST - 1), ("control", "cut")),
    ],
)  # fmt: skip
def test_cleaning(raw, cleaned, mended):
    for text, data in ((raw.encode(), None), (None, record(caption=raw.lstrip("\ufeff")))):
        found = annotated(text, data)
        assert found.captions == (cleaned,)
        assert sorted(found.mended) == list(mended)


MASKED = [
    (None, b"{}", "no_caption", "no caption"),
    (None, record(captions=[]), "no_caption", "no caption"),
    (b"", None, "no_caption", "caption 0 is empty"),
    (b" \0\n", None, "no_caption", "caption 0 is empty"),
    (b" " * LONGEST + b"too late", None, "no_caption", "caption 0 is empty"),
    (None, record(captions=["", " "]), "no_caption", "caption 0 is empty"),
    (b"caf\xe9", None, "utf8", r"its \.txt is not UTF-8 \(byte 3\)"),
    ("utf-16".encode("utf-16"), None, "utf8", r"its \.txt is not UTF-8 \(byte 0\)"),
    (b"\xed\xa0\xbd", None, "utf8", r"its \.txt is not UTF-8"),  # half a pair, as some encoders write it
    (b"fine", b'{"caption": "caf\xe9"}', "utf8", r"its \.json is not UTF-8"),
    (None, b'{"caption": "half \\ud83d a pair"}', "utf8", "caption 0 is not Unicode"),
    (b"fine", b'{"caption": ', "json", r"its \.json is not JSON"),
    (b"fine", b"", "json", r"its \.json is not JSON"),
    (b"fine", b"[" * 100_000, "json", r"its \.json is not JSON"),
    (b"fine", b'{"a":' * 100_000, "json", r"its \.json is not JSON"),
    (b"fine", b'{"n": ' + b"9" * 10_000 + b"}", "json", r"its \.json is not JSON"),
    (b"fine", b"[1]", "json", r"its \.json is not an object"),
    (b"fine", b"null", "json", r"its \.json is not an object"),
    (b"fine", record(caption=7), "not_text", "caption 0 is not text"),
    (b"fine", record(caption=0), "not_text", "caption 0 is not text"),
    (b"fine", record(captions={}), "not_text", "caption 0 is not text"),
    (b"fine", record(captions={"en": "a dog"}), "not_text", "caption 0 is not text"),
    (b"fine", record(captions=[["a dog"]]), "not_text", "caption 0 is not text"),
    (b"fine", record(captions=[None, 1]), "not_text", "caption 0 is not text"),
    (b"fine", record(boxes="none"), "box", "its boxes are not a list"),
    (b"fine", record(boxes={}), "box", "its boxes are not a list"),
]


@pytest.mark.parametrize(("text", "data", "kind", "reason"), MASKED)
def test_what_masks_a_sample_is_named(text, data, kind, reason):
    with pytest.raises(ContentError, match=reason) as caught:
        annotated(text, data)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("captions", "kept", "mended"),
    [
        (["", "a dog", " "], ("a dog",), ("no_caption", "no_caption")),
        ([None, "a dog", 7, ["a cat"]], ("a dog",), ("not_text",) * 3),
        (["half \ud83d a pair", "a dog"], ("a dog",), ("utf8",)),
        (["a\0 cat", "a dog"], ("a cat", "a dog"), ("control",)),
    ],
)
def test_one_bad_caption_leaves_the_others(captions, kept, mended):
    found = annotated(b"from txt", record(captions=captions))
    assert (found.captions, found.mended) == (kept, mended)


def test_of_a_name_that_stands_twice_the_last_counts():
    assert annotated(None, b'{"caption": "one", "caption": "two"}').captions == ("two",)


def test_only_what_is_asked_for_can_be_wrong():
    broken = record(captions=[7], boxes="none", class_id=-1)
    assert annotated(b"\xff", b"{", b"x", fields=IMAGE) == Annotations()
    assert annotated(b"\xff", record(class_id=3), fields=IMAGE | LABEL) == Annotations(label=3)
    assert annotated(b"fine", record(boxes=7), b"x", fields=TEXT) == Annotations(captions=("fine",))
    for fields, kind in ((TEXT, "not_text"), (LABEL, "class"), (TEXT | BOXES, "not_text")):
        with pytest.raises(ContentError) as caught:
            annotated(None, broken, fields=fields)
        assert caught.value.kind == kind
    with pytest.raises(ContentError, match="no class"):
        annotated(b"fine", None, fields=LABEL)
    with pytest.raises(ContentError, match="no caption"):
        annotated(None, None, b"3", fields=TEXT)


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


def test_one_bad_box_leaves_the_others_and_phrases_follow_their_captions():
    whole = [0, 0, 1, 1]
    boxes = [
        {"phrase": "of the empty one", "box_xyxy": whole, "caption_index": 0},
        {"phrase": "a cat", "box_xyxy": whole, "caption_index": 2},
        {"phrase": "in pixels", "box_xyxy": [0, 0, 320, 240], "caption_index": 1},
        {"phrase": "a dog", "box_xyxy": whole, "caption_index": 1},
        {"phrase": 7, "box_xyxy": whole, "caption_index": 1},
    ]
    found = annotated(None, record(captions=["", "a dog", "a cat"], boxes=boxes))
    assert found.captions == ("a dog", "a cat")
    assert [(phrase.text, phrase.caption) for phrase in found.phrases] == [("a cat", 1), ("a dog", 0)]
    assert found.mended == ("no_caption", "box", "box", "not_text")


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["phrase", "box_xyxy", "caption_index", "x"]), x), max_leaves=8)  # fmt: skip  # noqa: E501


def attempt(*parts):
    try:
        return annotated(*parts), None
    except ContentError as error:
        return None, error


@given(captions=JSON, caption=JSON, boxes=JSON)
def test_any_json_gives_captions_or_a_reason(captions, caption, boxes):
    found, fault = attempt(b"text", record(captions=captions, caption=caption, boxes=boxes))
    if found is None:
        assert fault is not None
        assert fault.kind in KINDS
        assert str(fault).isprintable()
        return
    assert found.captions
    assert all(isinstance(one, str) and one for one in found.captions)
    assert all(0 <= phrase.caption < len(found.captions) for phrase in found.phrases)
    assert set(found.mended) <= {*KINDS, "cut", "control"}


def test_every_kind_is_said_in_words():
    assert set(KINDS) == set(get_args(Kind))
