"""What is refused when the parts of a run are put together."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from datasets.errors import UserError
from datasets.holding import Holding, Holds
from datasets.loader import Feed
from datasets.scenes import Scenes
from datasets.sources import SourceConfig
from objectives import objective_class
from objectives.base import FUSED, IMAGE, TEXT, Objective, Pass, Widths
from pretrain.build import check_fused, check_size, check_written, drop_unread, feeding
from pretrain.cli import parse
from pretrain.config import Run

WIDTHS = Widths(embed=6, image_tokens=8, text_tokens=8, vocabulary=20, temperature=False, contrast=False)


def objectives(*kinds: str) -> dict[str, Objective]:
    return {kind: objective_class(kind)(objective_class(kind).Config(), WIDTHS) for kind in kinds}


def test_texts_that_nothing_opens_are_not_to_be_written():
    opened: Any = SimpleNamespace(start=0)
    unopened: Any = SimpleNamespace(start=None)
    check_written(opened, objectives("siglip", "lm"))
    check_written(unopened, objectives("itc", "siglip"))
    with pytest.raises(UserError, match="objective 'lm' predicts texts from their start token"):
        check_written(unopened, objectives("siglip", "lm"))


def reading(*passes: Pass) -> dict[str, Any]:
    return {"some": SimpleNamespace(passes=passes)}


def test_a_text_tower_of_transformers_is_not_to_look_at_images():
    unable: Any = SimpleNamespace(fusion=None)
    check_fused(unable, reading(IMAGE, TEXT))
    check_fused(SimpleNamespace(fusion=object()), reading(FUSED))  # type: ignore[arg-type]
    sentence = "objective 'some' reads text and image together, and this model's text tower is one of transf"
    with pytest.raises(UserError, match=sentence):
        check_fused(unable, reading(FUSED))


@pytest.mark.parametrize(
    ("passes", "left"),
    [((IMAGE,), set()), ((IMAGE, TEXT), {"text"}), ((IMAGE, FUSED), {"text", "fusion"})],
)
def test_the_text_tower_stays_where_fusion_reads_it(passes, left):
    model: Any = SimpleNamespace(text=1, captioner=SimpleNamespace(reads_states=True), fusion=1)
    drop_unread(model, reading(*passes))
    assert {name for name in ("text", "captioner", "fusion") if getattr(model, name) is not None} == left


def mixture(**sources: tuple[Holds, str]) -> tuple[Run, list[Feed]]:
    """A run of sources that hold something and name objectives."""
    configs = {
        name: SourceConfig(holds=holds, objectives=tuple(filter(None, named.split(","))))
        for name, (holds, named) in sources.items()
    }
    run = replace(parse(["--objectives", "itc,lm"]).run, sources=configs)
    source = Scenes(size=300)
    return run, [
        Feed(name=name, source=source, holding=Holding(holds=holds)) for name, (holds, _) in sources.items()
    ]


def test_a_source_feeds_what_it_names_or_all_that_it_can():
    fed = feeding(
        *mixture(
            pairs=("captions", ""), more=("captions", "itc"), books=("text", ""), kinds=("classes", "lm")
        ),
        "one",
    )
    assert fed == {"pairs": ("itc", "lm"), "more": ("itc",), "books": ("lm",), "kinds": ("lm",)}


def test_a_stage_feeds_its_own_objectives_from_its_own_sources():
    run, feeds = mixture(pairs=("captions", ""), more=("captions", "itc"), books=("text", ""))
    one = run.stages["one"]
    stages = {
        "one": replace(one, sources={"pairs": 1.0, "books": 1.0}, objectives={"lm": 1.0}),
        "two": replace(one, sources={"more": 1.0}, objectives={"itc": 0.5}),
        "bad": replace(one, sources={"more": 1.0}, objectives={"lm": 1.0}),
    }
    run = replace(run, stages=stages)
    assert feeding(run, feeds, "one") == {"pairs": ("lm",), "books": ("lm",)}
    assert feeding(run, feeds, "two") == {"more": ("itc",)}
    with pytest.raises(UserError, match="no source of stage 'bad' feeds objective 'lm'"):
        feeding(run, feeds, "bad")


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        ({"books": ("text", "")}, "objective 'itc' needs image, which scenes does not give as text"),
        (
            {"pairs": ("captions", ""), "books": ("text", "itc")},
            "objective 'itc' needs image, which scenes does not give as text: that gives text",
        ),
        ({"pairs": ("captions", "lm")}, "no source feeds objective 'itc': name it in a --sources.NAME.obj"),
        (
            {"pairs": ("captions", ""), "photos": ("images", "")},
            "no objective of this run can be fed with source 'photos', which gives image",
        ),
    ],
)
def test_what_cannot_be_fed_is_refused_in_one_sentence(sources, sentence):
    with pytest.raises(UserError, match=sentence) as raised:
        feeding(*mixture(**sources), "one")
    assert "\n" not in str(raised.value)


def test_a_small_source_may_have_a_small_share():
    """It needs what a step may take of it: its largest share, and what is carried over."""
    run, feeds = mixture(pairs=("captions", ""), few=("captions", ""))
    run = replace(run, stages={"one": replace(run.stages["one"], batch=2000)})
    feeds[0] = replace(feeds[0], source=Scenes())
    points = ((0, 0.0), (100, 0.15))
    check_size(run, [feeds[0], replace(feeds[1], weight=points)])
    with pytest.raises(UserError, match="300 samples, too few for one batch that takes 350"):
        check_size(run, [feeds[0], replace(feeds[1], weight=((0, 0.0), (100, 0.2)))])


def test_a_source_smaller_than_the_largest_batch_is_refused():
    run, feeds = mixture(pairs=("captions", ""))
    stages = {name: replace(run.stages["one"], batch=batch) for name, batch in (("a", 300), ("b", 301))}
    check_size(replace(run, stages={"a": stages["a"]}), feeds)
    with pytest.raises(UserError, match="scenes has 300 samples, too few for one batch that takes 301"):
        check_size(replace(run, stages=stages), feeds)


def test_a_source_has_a_name_that_can_be_a_files():
    run, _ = mixture(pairs=("captions", ""))
    with pytest.raises(UserError, match=r"a source cannot be called '\.\./c': give it a name"):
        replace(run, sources={"../c": SourceConfig()}).check()
