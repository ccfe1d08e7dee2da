"""Contrast at the edges of its parameters stays finite, and its logits are float32 also under autocast."""

import math

import pytest
import torch

from objectives.contrast import MAX_LOGIT_SCALE
from pretrain.encodings import ModelEncodings
from pretrain.testing import make_samples, merge, tiny_pretrainer

BATCH = merge(make_samples(23))


def loss_and_gradients(kind: str, *, scale: float, bias: float | None, dtype: torch.dtype, bf16: bool):
    """The summed loss, and the gradients at the images, the texts and the temperature."""
    pretrainer = tiny_pretrainer((kind,)).to(dtype)
    model, objective = pretrainer.model, pretrainer.objectives[kind]
    with torch.no_grad():
        model.logit_scale.fill_(scale)
        if bias is not None and model.logit_bias is not None:
            model.logit_bias.fill_(bias)
    drawn = torch.Generator().manual_seed(0)
    given = {}
    for wanted, rows in zip(objective.coupled, (len(BATCH.images), len(BATCH.tokens)), strict=True):
        unit = torch.nn.functional.normalize(torch.randn(rows, 6, generator=drawn), dim=1)
        # As a tower gives them under autocast; the reference sees the very same numbers.
        given[wanted] = unit.bfloat16().to(torch.bfloat16 if bf16 else dtype).requires_grad_()
    encodings = ModelEncodings(model, BATCH, group=None, key=(0,), given=given)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        total = objective(encodings, BATCH).total
    total.backward()
    assert model.logit_scale.grad is not None
    return total.detach(), [*(each.grad for each in given.values()), model.logit_scale.grad]


@pytest.mark.parametrize("kind", ["itc", "siglip"])
def test_under_autocast_logits_are_float32(kind):
    """At scale 100 a bfloat16 logit is off by up to 0.25; this loss is that of float64 to the last digits."""
    options = {"scale": MAX_LOGIT_SCALE, "bias": -10.0}
    total, gradients = loss_and_gradients(kind, **options, dtype=torch.float32, bf16=True)
    exact, expected = loss_and_gradients(kind, **options, dtype=torch.float64, bf16=False)
    assert total.dtype == torch.float32
    assert abs(float(total) - float(exact)) <= 1e-5 * abs(float(exact))
    for found, reference in zip(gradients, expected, strict=True):
        # Those at the encodings are in their own bfloat16, of 8 bits.
        rounded = 2e-2 if found.dtype == torch.bfloat16 else 1e-5
        assert (found.double() - reference).norm() <= rounded * reference.norm()


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("bias", [-10_000.0, -100.0, 0.0, 100.0, 10_000.0])
@pytest.mark.parametrize("scale", [-math.log(100), 0.0, MAX_LOGIT_SCALE], ids=["0.01", "1", "100"])
@pytest.mark.parametrize("kind", ["itc", "siglip"])
def test_extreme_scales_and_biases_are_finite(kind, scale, bias, bf16):
    total, gradients = loss_and_gradients(kind, scale=scale, bias=bias, dtype=torch.float32, bf16=bf16)
    assert total.isfinite()
    assert all(each.isfinite().all() for each in gradients)
