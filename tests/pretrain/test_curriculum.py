"""What holds at a step, against counting step by step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.errors import UserError
from datasets.weights import weight_at, weights_in
from pretrain.bystep import check_by_step, held_at
from pretrain.curriculum import Curriculum
from pretrain.recipes import stages as published
from pretrain.stage import Stage


@st.composite
def by_step(draw, largest=40):
    if draw(st.booleans()):
        return draw(st.integers(1, 64))
    firsts = sorted({0, *draw(st.lists(st.integers(1, largest), max_size=3))})
    return tuple((first, draw(st.integers(1, 64))) for first in firsts)


@st.composite
def curricula(draw):
    sizes = st.builds(Stage, steps=st.integers(1, 30), batch=by_step(), resolution=by_step())
    return {f"s{place}": stage for place, stage in enumerate(draw(st.lists(sizes, min_size=1, max_size=4)))}


@given(curricula())
def test_every_step_belongs_to_one_stretch_with_the_sizes_of_its_stage(stages):
    curriculum, samples, step = Curriculum(stages), 0, 0
    for name, stage in stages.items():
        for inside in range(stage.steps):
            stretch = curriculum.stretch_of(step)
            assert (stretch.name, stretch.begins) == (name, step - inside)
            assert stretch.first <= step < stretch.last <= stretch.ends
            assert (stretch.batch, stretch.resolution) == (
                held_at(stage.batch, inside),
                held_at(stage.resolution, inside),
            )
            assert stretch.position_at(step) == curriculum.samples_at(step) == samples
            samples += stretch.batch
            step += 1
        assert list(curriculum.finished_at(step)) == list(stages)[: list(stages).index(name) + 1]
        assert name not in curriculum.finished_at(step - 1)
    assert (curriculum.steps, curriculum.samples) == (step, samples)
    assert [each.first for each in curriculum.stretches[1:]] == [
        each.last for each in curriculum.stretches[:-1]
    ]


def test_what_holds_from_a_step_on():
    sides = ((0, 224), (30_000, 490))
    assert [held_at(sides, step) for step in (0, 29_999, 30_000, 59_999)] == [224, 224, 490, 490]
    assert held_at(7, 10**9) == 7


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (0, "is 0; it must be at least 1"),
        (((0, 64), (5, -1)), "is -1; it must be at least 1"),
        (((1, 64),), "from 0 on"),
        (((0, 64), (5, 96), (5, 128)), "rising steps"),
        ((), "STEP VALUE points"),
        (((0, 64), (9, 96)), "changes at step 9, which a stage of 9 steps never reaches"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(value, sentence):
    with pytest.raises(UserError, match=f"--stages.one.batch .*{sentence}"):
        check_by_step(value, "--stages.one.batch", steps=9)


def test_the_published_numbers():
    """RECIPES: 983 M samples, 0.66 of 1.5 billion pairs; 61.4 M in stage two, of which 30.7 M at 490 px."""
    run = published.recipe()
    one, two, large = Curriculum(run.stages).stretches
    assert (one.last - one.first) * one.batch == 983_040_000
    assert [(each.last - each.first) * each.batch for each in (two, large)] == [30_720_000] * 2
    assert [each.resolution for each in (one, two, large)] == [224, 224, 490]
    for stage, lr, warmup in ((one.stage, 1e-4, 12_000), (two.stage, 1e-5, 1_200)):
        optim = stage.optim
        assert (optim.lr, optim.warmup, optim.schedule) == (lr, warmup, "cosine")
        assert (optim.betas, optim.eps, optim.weight_decay) == ((0.9, 0.95), 1e-8, 0.05)
        assert stage.ema > 0
    assert two.stage.moments == "kept"


def test_weights_of_a_stage_count_its_own_steps_and_those_of_the_run_the_runs():
    own = {"a": ((0, 0.0), (100, 1.0)), "b": 2.0}
    assert weights_in({}, own, begins=50) == own
    chosen = weights_in({"b": ((0, 1.0), (10, 3.0))}, own, begins=50)
    assert [weight_at(chosen["b"], step) for step in (50, 55, 60, 99)] == [1.0, 2.0, 3.0, 3.0]
    assert list(chosen) == ["b"]
