"""Patterns over parameter names freeze, and say how fast the rest learns."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from datasets.errors import UserError
from pretrain.distributed import Ranks
from pretrain.optim import Optim, build_optimizer
from pretrain.parallel import Spread, wrap
from pretrain.precision import Compute
from pretrain.step import Setup, agree, train_step
from pretrain.testing import make_samples, split, tiny_pretrainer
from pretrain.trainable import set_trainable

FLAG = "--stages.one.trainable"
KINDS = ("itc", "lm", "itm")


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


def test_a_multiplier_for_what_does_not_train_is_refused_unless_it_reaches_more():
    pretrainer = tiny_pretrainer(("itc", "lm"))
    for name, parameter in pretrainer.named_parameters():
        parameter.requires_grad_(not name.startswith("model.text."))
    with pytest.raises(UserError, match=r"'text.project.\*' is 0.5 for what does not train"):
        set_trainable(pretrainer, {"text.project.*": 0.5}, flag=FLAG)
    found = set_trainable(pretrainer, {"text.*": 0.0, "*.project.*": 0.5}, flag=FLAG)
    assert {name for name, multiplier in found.items() if multiplier == 0.5} == {
        "model.image.project.weight",
        "model.image.project.bias",
    }


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
        (
            {"imgae.*": 0.0},
            r"--stages.one.trainable 'imgae.\*' matches no parameter: the nearest are image.\*",
        ),
        ({"image": 0.0}, r"for all of it write 'image.\*'"),
        ({"model.text": 0.0}, r"for all of it write 'model.text.\*'"),
        ({"image.project.wieght": 0.0}, "the nearest are image.project.weight"),
        ({"image.*": -1.0}, r"--stages.one.trainable 'image.\*' is -1.0; it must be at least 0"),
        ({"image.*": float("nan")}, "is nan; it must be at least 0"),
        ({"image.*": 1.0, "*": 0.0}, "--stages.one.trainable freezes every parameter"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(patterns, says):
    with pytest.raises(UserError, match=says) as raised:
        set_trainable(tiny_pretrainer(("itc",)), patterns, flag=FLAG)
    assert "\n" not in str(raised.value)


def trained(
    ranks: Ranks,
    *,
    patterns: dict[str, float],
    parallel: str,
    micro_batches: int,
    fed: tuple[str, ...] = KINDS,
) -> list[str]:
    """The parameters that two steps have changed."""
    pretrainer = tiny_pretrainer(KINDS, ranks.group, feeds={"": fed}).float()
    multipliers = set_trainable(pretrainer, patterns, flag=FLAG)
    wrapped = wrap(pretrainer, ranks, Spread(parallel=parallel))  # type: ignore[arg-type]
    setup = Setup(wrapped=wrapped, compute=Compute(device=ranks.device, bf16=False))
    optimizer = build_optimizer(pretrainer, Optim(lr=0.1), multipliers)
    before = {name: whole(each) for name, each in pretrainer.named_parameters()}
    batches = split(make_samples(23), ranks, micro_batches)
    for step in range(2):
        done = train_step(
            setup,
            batches,
            optimizer,
            counts=agree(setup, batches).counts,
            weights=dict.fromkeys(KINDS, 1.0),
            largest_norm=1.0,
            key=(0, step),
        )
        assert done.fault is None
    after = {name: whole(each) for name, each in pretrainer.named_parameters()}
    return [name for name in before if not torch.equal(before[name], after[name])]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(("parallel", "world"), [("ddp", 1), ("ddp", 2), ("fsdp", 2)])
@pytest.mark.parametrize(
    "patterns",
    [
        {"image.*": 0.0},
        {"text.*": 0.0, "image.patches.*": 0.0},
        {"*": 0.0, "captioner.*": 1.0},
        {"*": 0.0, "logit_scale": 1.0},
        {"*": 0.0, "objectives.*": 1.0},
    ],
    ids=lambda patterns: "+".join(patterns),
)
def test_what_is_frozen_stays_and_the_rest_trains(pool, patterns, parallel, world, micro_batches):
    """Also where whole objectives are left without a gradient."""
    expected = set_trainable(tiny_pretrainer(KINDS), patterns, flag=FLAG)
    for found in pool.run(trained, world, patterns=patterns, parallel=parallel, micro_batches=micro_batches):
        assert set(found) <= set(expected)
        assert len(found) >= 0.6 * len(expected)


@pytest.mark.parametrize(("parallel", "world"), [("ddp", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_source_that_feeds_only_what_is_frozen_changes_nothing(pool, parallel, world):
    how = {"patterns": {"*": 0.0, "captioner.*": 1.0}, "parallel": parallel, "micro_batches": 1}
    assert pool.run(trained, world, fed=("itc",), **how) == [[]] * world
