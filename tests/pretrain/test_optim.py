"""The updates are those of the papers, in groups that know their rates and their decay."""

import math

import pytest
import torch
from torch import Tensor, nn

from datasets.errors import UserError
from pretrain.optim import Optim, build_optimizer, set_rate
from pretrain.testing import tiny_pretrainer

LR, DECAY, B1, B2, EPS = 0.1, 0.2, 0.9, 0.99, 1e-8


class One(nn.Module):
    """One matrix that decays, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(40, 36, dtype=torch.float64))


def trained(gradients: list[Tensor], **settings) -> Tensor:
    """The matrix after steps with these gradients, at a constant rate."""
    optim = Optim(**{"lr": LR, "weight_decay": DECAY, "betas": (B1, B2), "eps": EPS, "warmup": 0, **settings})
    module = One()
    optimizer = build_optimizer(module, optim)
    for step, gradient in enumerate(gradients):
        set_rate(optimizer, Optim(**{**vars(optim), "schedule": "constant"}), step=step, steps=99)
        module.weight.grad = gradient.clone()
        optimizer.step()
    return module.weight.detach()


def gradients(sizes=(1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 30.0, 1.0)) -> list[Tensor]:
    """One of them is far larger than those before it, as before a loss spike."""
    random = torch.Generator().manual_seed(1)
    return [size * torch.randn(40, 36, generator=random, dtype=torch.float64) for size in sizes]


def adam(steps: list[Tensor], *, largest: float = math.inf, sizes: list[float] | None = None) -> Tensor:
    """AdamW as published, with StableAdamW's clip of g / sqrt(v) (arXiv 2304.13013, algorithm 2)."""
    weight = One().weight.detach().clone()
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for count, gradient in enumerate(steps, 1):
        mean = B1 * mean + (1 - B1) * gradient
        square = B2 * square + (1 - B2) * gradient**2
        root = (square / (1 - B2**count)).sqrt() + EPS
        size = (gradient / root).square().mean().sqrt().item()
        if sizes is not None:
            sizes.append(size)
        weight = weight * (1 - LR * DECAY)
        weight -= LR / max(1, size / largest) * (mean / (1 - B1**count)) / root
    return weight


def test_adamw_is_the_published_one():
    assert torch.allclose(trained(gradients()), adam(gradients()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("largest", [1.0, 0.5])
def test_an_update_clip_is_that_of_the_paper(largest):
    sizes: list[float] = []
    expected = adam(gradients(), largest=largest, sizes=sizes)
    assert sizes[6] > 2 > 1.01 > sizes[0]  # the large one is what it is for
    assert torch.allclose(trained(gradients(), update_clip=largest), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(trained(gradients()), expected, rtol=0, atol=1e-3)
    assert torch.allclose(trained(gradients(), update_clip=1e9), adam(gradients()), rtol=0, atol=1e-12)


def test_lamb_is_the_published_one():
    """Algorithm 2 of arXiv 1904.00962; it does not clip the gradient once more."""
    weight = One().weight.detach().clone()
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for count, gradient in enumerate(gradients(), 1):
        mean = B1 * mean + (1 - B1) * gradient
        square = B2 * square + (1 - B2) * gradient**2
        ratio = (mean / (1 - B1**count)) / ((square / (1 - B2**count)).sqrt() + EPS) + DECAY * weight
        weight = weight - LR * weight.norm() / ratio.norm() * ratio
    assert torch.allclose(trained(gradients(), kind="lamb"), weight, rtol=0, atol=1e-9)


def test_lion_is_the_published_one():
    """Algorithm 2 of arXiv 2302.06675."""
    weight = One().weight.detach().clone()
    mean = torch.zeros_like(weight)
    for gradient in gradients():
        weight = weight - LR * ((B1 * mean + (1 - B1) * gradient).sign() + DECAY * weight)
        mean = B2 * mean + (1 - B2) * gradient
    assert torch.allclose(trained(gradients(), kind="lion"), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("largest", [0.0, 0.5])
def test_adafactor_is_big_visions(largest):
    """scale_by_adafactor of big_vision/optax.py (arXiv 2106.04560, 3.4): its momentum is kept in bf16."""
    weight, mean = One().weight.detach().clone(), torch.zeros(40, 36, dtype=torch.bfloat16)
    rows, columns = torch.zeros(40, 1).double(), torch.zeros(1, 36).double()
    for count, gradient in enumerate(gradients(), 1):
        decay = min(B2, 1 - count**-0.8)
        rows = decay * rows + (1 - decay) * (gradient**2 + 1e-30).mean(1, keepdim=True)
        columns = decay * columns + (1 - decay) * (gradient**2 + 1e-30).mean(0, keepdim=True)
        update = gradient / (rows * columns / rows.mean()).sqrt()
        if largest:
            update = update / max(1, update.square().mean().sqrt().item() / largest)
        mean = mean.lerp(update.bfloat16(), 1 - B1)
        weight = weight - LR * (mean.double() + DECAY * weight)
    found = trained(gradients(), kind="adafactor", update_clip=largest)
    assert torch.allclose(found, weight, rtol=0, atol=2e-3 * LR)  # a last bit of eight


def groups_of(optimizer, module) -> dict[str, tuple[bool, float]]:
    """Of each parameter: whether it decays, and the scale of its rate."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {names[p]: (g["decays"], g["scale"]) for g in optimizer.param_groups for p in g["params"]}


def test_multipliers_scale_the_rate_and_nothing_else():
    pretrainer = tiny_pretrainer(("itc", "lm"))
    optim = Optim(lr=0.2, warmup=4)
    plain = groups_of(build_optimizer(pretrainer, optim), pretrainer)
    assert set(plain.values()) == {(True, 1.0), (False, 1.0)}
    assert plain["model.text.project.weight"] == plain["model.text.words.weight"] == (True, 1.0)
    assert plain["model.text.project.bias"] == plain["model.logit_scale"] == (False, 1.0)

    multipliers = {"model.text.project.weight": 0.1, "model.text.project.bias": 3.0}
    pretrainer.get_parameter("model.text.words.weight").requires_grad_(False)
    optimizer = build_optimizer(pretrainer, optim, multipliers)
    found = groups_of(optimizer, pretrainer)
    assert found == {
        name: (decays, multipliers.get(name, 1.0))
        for name, (decays, _) in plain.items()
        if name != "model.text.words.weight"
    }
    set_rate(optimizer, optim, step=1, steps=10)
    for group in optimizer.param_groups:
        assert group["lr"] == optim.lr_at(1, 10) * group["scale"] == 0.1 * group["scale"]
        assert group["weight_decay"] == (optim.weight_decay if group["decays"] else 0.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "lion", "update_clip": 1.0}, "--optim.update_clip goes with adamw and adafactor"),
        ({"layer_decay": 0.0}, "--optim.layer_decay is 0.0; it must lie above 0"),
        ({"text_layer_decay": 1.5}, "--optim.text_layer_decay is 1.5; it must lie above 0"),
        ({"update_clip": -1.0}, "--optim.update_clip is -1.0; it must be a number of at least 0"),
        ({"betas": (0.9, 1.0)}, "--optim.betas are"),
    ],
)
def test_what_no_optimizer_can_be_is_one_sentence(settings, says):
    with pytest.raises(UserError, match=says):
        Optim(**settings).check("--optim", steps=10_000)
