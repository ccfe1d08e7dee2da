"""Every objective in the table keeps the contract."""

import pytest
import torch

from datasets.errors import UserError
from datasets.source import EVERYTHING
from datasets.weights import weight_at
from objectives import OBJECTIVES, kind_of, objective_class
from objectives.base import VOCABULARY, Widths
from pretrain.testing import make_samples, merge

WIDTHS = Widths(embed=6, image_tokens=8, text_tokens=8, vocabulary=20, temperature=True, contrast=False)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_contract(kind):
    owner = objective_class(kind)
    assert kind_of(owner.Config()) == kind
    objective = owner(owner.Config(), WIDTHS)
    assert objective.passes
    assert {wanted.what for wanted in objective.passes} <= set(VOCABULARY)
    assert set(objective.coupled) <= set(objective.passes)
    assert owner.needs <= EVERYTHING
    assert owner.__doc__
    for size in (1, 2, 15):
        count = objective.denominator(merge(make_samples(size)))
        assert count.shape == ()
        assert count.dtype == torch.int64


def test_an_unknown_kind_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'siglip'"):
        objective_class("sigclip")


def test_weights_are_constant_or_lines_between_points():
    assert weight_at(2, 5) == 2.0
    ramp = ((10, 0.0), (20, 1.0), (30, 0.5))
    assert [weight_at(ramp, step) for step in (0, 10, 15, 20, 25, 30, 99)] == [0, 0, 0.5, 1, 0.75, 0.5, 0.5]
