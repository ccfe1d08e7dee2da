"""From settings to the feeds of a mixture, and what is refused on the way."""

import json

import pytest

from datasets.errors import UserError
from datasets.health import Meter
from datasets.holding import Holding
from datasets.remote.fetch import Remote
from datasets.sources import SourceConfig, open_mixture

BOX = {"phrase": "a dog", "box_xyxy": [0.0, 0.0, 0.5, 1.0]}


@pytest.fixture
def shard(tmp_path, pack):
    """Call it with the records of some samples, and whether images stand beside them."""

    def write(name, *records, images=True):
        members = []
        for number, record in enumerate(records):
            if images:
                members.append((f"{number:03d}.jpg", b"no image, which is met when it is read"))
            members.append((f"{number:03d}.json", json.dumps(record).encode()))
        return str(pack(tmp_path / f"{name}.tar", members))

    return write


def opened(**sources):
    return open_mixture(sources, seed=1, remote=Remote(), meter=Meter())


def test_a_mixture_is_opened_in_its_order(shard):
    classes = shard("classes", {"class": 7}, {"class": "dog"})
    feeds = opened(
        pairs=SourceConfig(data=shard("pairs", {"caption": "a dog", "boxes": [BOX]}), captions="all"),
        boxes=SourceConfig(data=shard("boxes", {"caption": "a dog", "boxes": [BOX]}), holds="phrases"),
        books=SourceConfig(
            data=shard("books", {"caption": "a tale"}, images=False), holds="text", weight=0.5
        ),
        kinds=SourceConfig(data=classes, holds="classes", weight=((0, 0.0), (9, 1.0))),
        photos=SourceConfig(holds="images"),
    )
    assert [feed.name for feed in feeds] == ["pairs", "boxes", "books", "kinds", "photos"]
    assert [feed.weight for feed in feeds] == [1.0, 1.0, 0.5, ((0, 0.0), (9, 1.0)), 1.0]
    assert [feed.source.size for feed in feeds] == [1, 1, 1, 2, None]
    assert [feed.holding.holds for feed in feeds] == ["captions", "phrases", "text", "classes", "images"]
    assert feeds[0].holding == Holding(choose="all")
    classes = feeds[3].holding.classes
    assert classes is not None
    assert classes.templates == ("a photo of a {}.",)


@pytest.mark.parametrize(
    ("holds", "records", "images", "sentence"),
    [
        ("phrases", [{"caption": "a dog"}], True, r"holds phrases needs boxes, which .*x\.tar does not hold"),
        ("captions", [{"caption": "a dog"}], False, r"holds captions needs image, .*; it holds text"),
        ("text", [{"class": "dog"}], True, r"holds text needs text, .*; it holds image, label"),
        ("classes", [{"caption": "a dog"}], True, r"holds classes needs label"),
        (
            "classes",
            [{"class": [7]}, {"class_id": 3}],
            True,
            r"are numbers: name them with --sources.mine.classes",
        ),
    ],
)
def test_what_the_data_do_not_hold_is_refused_with_the_flag(shard, holds, records, images, sentence):
    data = shard("x", *records, images=images)
    with pytest.raises(UserError, match=sentence) as raised:
        opened(mine=SourceConfig(data=data, holds=holds))
    assert "--sources.mine." in str(raised.value)
    assert "\n" not in str(raised.value)


def test_numbers_are_named_by_a_file(shard, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("dog\ncat\na {}\n")
    config = SourceConfig(data=shard("x", {"class_id": 1}), holds="classes", classes=str(names))
    (feed,) = opened(kinds=config)
    sample = feed.source.read(0, seed=(0,), resolution=1, fields=frozenset({"label"}))
    assert feed.holding(sample, (0,)).captions == ("a cat",)
