"""Each schedule is that of another implementation, or of the formula that was published."""

import math

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR
from transformers import get_wsd_schedule

from datasets.errors import UserError
from pretrain.optim import Optim

LR, WARMUP, STEPS = 0.3, 7, 60


def rates(**settings) -> list[float]:
    optim = Optim(lr=LR, **{"warmup": WARMUP, **settings})
    optim.check("--optim", steps=10_000)
    return [optim.lr_at(step, STEPS) for step in range(STEPS)]


def told(make, *, steps: int) -> list[float]:
    """What a scheduler of a library says of each step."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_default_has_the_bits_it_always_had():
    for lr, warmup, steps in (
        (3e-3, 100, 1_250),
        (5e-4, 2_000, 9_000),
        (1e-7, 0, 77),
        (4e-3, 1, 3),
        (0.1, 9, 9),
    ):
        optim = Optim(lr=lr, warmup=warmup)
        for step in range(steps):
            done = (step - warmup) / max(1, steps - warmup)
            after = lr * 0.5 * (1 + math.cos(math.pi * done))
            assert optim.lr_at(step, steps) == (lr * (step + 1) / warmup if step < warmup else after)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "rsqrt", "step", "constant"])
def test_all_warm_up_in_a_straight_line_to_the_peak(schedule):
    found = rates(schedule=schedule, **({"milestones": (30,)} if schedule == "step" else {}))
    assert found[: WARMUP + 1] == pytest.approx([*(LR * (step + 1) / WARMUP for step in range(WARMUP)), LR])


@pytest.mark.parametrize("floor", [0.0, 0.02])
def test_cosine_and_linear_are_those_of_torch(floor):
    after = STEPS - WARMUP
    cosine = told(lambda o: CosineAnnealingLR(o, after, eta_min=floor), steps=after)
    assert rates(floor=floor)[WARMUP:] == pytest.approx(cosine, rel=1e-9)
    linear = told(lambda o: LinearLR(o, 1.0, floor / LR, after), steps=after)
    assert rates(schedule="linear", floor=floor)[WARMUP:] == pytest.approx(linear, rel=1e-9)


def test_step_is_that_of_torch():
    expected = told(lambda o: MultiStepLR(o, [20, 21, 50], gamma=0.2), steps=STEPS)
    assert rates(schedule="step", warmup=0, milestones=(20, 21, 50), factor=0.2) == pytest.approx(expected)
    assert [round(rate / LR, 3) for rate in expected[19:23]] == [1.0, 0.2, 0.04, 0.04]


@pytest.mark.parametrize("floor", [0.0, 0.03])
def test_warm_up_stable_decay_is_that_of_transformers(floor):
    def make(optimizer):
        return get_wsd_schedule(
            optimizer, 0, 20, num_training_steps=STEPS, decay_type="linear", min_lr_ratio=floor / LR
        )

    found = rates(schedule="wsd", cooldown=20, floor=floor)
    assert found[WARMUP:] == pytest.approx(told(make, steps=STEPS)[WARMUP:])
    assert found[WARMUP : STEPS - 19] == [pytest.approx(LR)] * (STEPS - 19 - WARMUP)
    assert found[-1] == pytest.approx(floor + (LR - floor) / 20)


def test_rsqrt_is_big_visions():
    """big_vision.utils.create_learning_rate_schedule, of which the warm-up begins a step earlier."""
    found = rates(schedule="rsqrt", timescale=10, cooldown=12)
    for step in range(WARMUP, STEPS):
        rate = LR / math.sqrt(1 + (step - WARMUP) / 10)
        assert found[step] == pytest.approx(rate * min(1.0, (STEPS - step) / 12))
    assert found[WARMUP + 10] == pytest.approx(LR / math.sqrt(2))


def test_constant_stays():
    assert rates(schedule="constant")[WARMUP:] == [pytest.approx(LR)] * (STEPS - WARMUP)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"floor": 0.5, "lr": 0.1}, "--optim.floor is 0.5, above the peak 0.1"),
        ({"cooldown": 5}, "--optim.cooldown goes with rsqrt and wsd, and --optim.schedule is cosine"),
        ({"schedule": "wsd"}, "--optim.schedule wsd needs a --optim.cooldown"),
        ({"schedule": "step"}, "--optim.schedule is step: step needs some"),
        ({"milestones": (5,)}, "--optim.schedule is cosine: step needs some, and the others have none"),
        ({"schedule": "step", "milestones": (5, 5)}, "they must rise"),
        ({"schedule": "step", "milestones": (0, 5)}, "they must rise, from at least 1"),
        ({"timescale": 0}, "--optim.timescale is 0; it must be a number above 0"),
    ],
)
def test_what_no_schedule_can_be_is_one_sentence(settings, says):
    with pytest.raises(UserError, match=says) as raised:
        Optim(**settings).check("--optim", steps=10_000)
    assert "\n" not in str(raised.value)
