"""Patterns over parameter names freeze, and say how fast the rest learns."""

import pytest
from torch import nn

from datasets.errors import UserError
from pretrain.testing import tiny_pretrainer
from pretrain.trainable import set_trainable

FLAG = "--stages.one.trainable"


def test_without_patterns_all_train_alike():
    pretrainer = tiny_pretrainer(("itc", "lm"))
    assert set_trainable(pretrainer, {}, flag=FLAG) == dict.fromkeys(dict(pretrainer.named_parameters()), 1.0)


def test_the_last_pattern_that_matches_counts_with_and_without_the_first_word():
    pretrainer = tiny_pretrainer(("itc", "lm"))
    found = set_trainable(
        pretrainer,
        {"*": 0.0, "image.*": 0.1, "model.image.project.*": 0, "model.text.project.bias": 2.0},
        flag=FLAG,
    )
    assert found == {
        "model.image.patches.weight": 0.1,
        "model.image.patches.bias": 0.1,
        "model.text.project.bias": 2.0,
    }
    assert found.keys() == {name for name, p in pretrainer.named_parameters() if p.requires_grad}


def test_what_was_frozen_by_its_maker_stays_so():
    pretrainer = tiny_pretrainer(("itc",))
    pretrainer.get_parameter("model.image.project.bias").requires_grad_(False)
    assert "model.image.project.bias" not in set_trainable(pretrainer, {"image.*": 0.5}, flag=FLAG)


def test_tied_weights_have_two_names():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(4, 3), nn.Linear(3, 4)
            self.head.weight = self.words.weight

    tied = Tied()
    assert set_trainable(tied, {"head.weight": 0.0}, flag=FLAG) == {"head.bias": 1.0}
    assert not tied.words.weight.requires_grad


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        ({"imgae.*": 0.0}, r"--stages.one.trainable.imgae.\* matches no parameter: the nearest are image.\*"),
        ({"image": 0.0}, r"for all of it write 'image.\*'"),
        ({"model.text": 0.0}, r"for all of it write 'model.text.\*'"),
        ({"image.project.wieght": 0.0}, "the nearest are image.project.weight"),
        ({"image.*": -1.0}, r"--stages.one.trainable.image.\* is -1.0; it must be at least 0"),
        ({"image.*": float("nan")}, "is nan; it must be at least 0"),
        ({"image.*": 1.0, "*": 0.0}, "--stages.one.trainable freezes every parameter"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(patterns, says):
    with pytest.raises(UserError, match=says) as raised:
        set_trainable(tiny_pretrainer(("itc",)), patterns, flag=FLAG)
    assert "\n" not in str(raised.value)
