"""itc and siglip against open_clip's losses, and against the formula written as a loop in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from datasets.batch import Batch
from objectives.base import IMAGE, TEXT, Widths
from objectives.contrast import similarity
from objectives.itc import ITC
from objectives.siglip import SigLIP

WIDTHS = Widths(embed=16, image_tokens=1, text_tokens=1, vocabulary=1, temperature=True, contrast=False)


class Given:
    """Encodings that are simply there."""

    group = None

    def __init__(self, image, text, *, scale: float, bias: float | None = None) -> None:
        self._given = {IMAGE: image, TEXT: text}
        self.logit_scale = torch.tensor([math.log(scale)], dtype=image.dtype, requires_grad=True)
        self.logit_bias = None if bias is None else torch.tensor([bias], dtype=image.dtype)

    def __getitem__(self, wanted):
        return self._given[wanted]

    def vocabulary_loss(self, states, targets, *, smoothing):
        raise AssertionError


def unit(rows: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 16, generator=random, dtype=torch.float64), dim=-1).requires_grad_()


def batch_of(image_index, text_id=None, *, images: int, masked_images=(), masked_texts=()) -> Batch:
    texts = len(image_index)
    return Batch(
        images=torch.zeros(images, 3, 1, 1, dtype=torch.uint8),
        image_valid=torch.tensor([i not in masked_images for i in range(images)]),
        tokens=torch.zeros(texts, 2, dtype=torch.int64),
        text_length=torch.full((texts,), 2),
        image_index=torch.tensor(image_index),
        text_valid=torch.tensor([t not in masked_texts for t in range(texts)]),
        text_id=torch.tensor(list(range(texts)) if text_id is None else text_id),
        boxes=torch.zeros(texts, 4),
        box_valid=torch.zeros(texts, dtype=torch.bool),
        keys=(),
        sample_id=torch.arange(images),
    )


def test_itc_is_open_clips_loss_and_gradient_on_plain_pairs():
    from open_clip.loss import ClipLoss

    image, text = unit(12, 0), unit(12, 1)
    encodings = Given(image, text, scale=30.0)
    batch = batch_of(list(range(12)), images=12)
    objective = ITC(ITC.Config(), WIDTHS)
    ours = objective(encodings, batch).total / objective.denominator(batch)
    gradients = torch.autograd.grad(ours, [image, text, encodings.logit_scale])
    scale = torch.tensor([math.log(30.0)], dtype=torch.float64, requires_grad=True)
    theirs = ClipLoss()(image, text, scale.exp())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for mine, reference in zip(gradients, torch.autograd.grad(theirs, [image, text, scale]), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-14)


def test_siglip_is_open_clips_loss_and_gradient_on_plain_pairs():
    from open_clip.loss import SigLipLoss

    image, text = unit(12, 0), unit(12, 1)
    encodings = Given(image, text, scale=10.0, bias=-10.0)
    batch = batch_of(list(range(12)), images=12)
    objective = SigLIP(SigLIP.Config(), WIDTHS)
    ours = objective(encodings, batch).total / objective.denominator(batch)
    theirs = SigLipLoss()(image, text, torch.tensor(10.0), torch.tensor(-10.0))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for mine, reference in zip(
        torch.autograd.grad(ours, [image, text]), torch.autograd.grad(theirs, [image, text]), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-14)


def by_hand_itc(image, text, batch: Batch, scale: float) -> float:
    """Every pair in turn: -log of its share among itself and what is no kin of it."""
    pairs = [(t, int(batch.image_index[t])) for t in range(len(text)) if batch.pair_valid[t]]
    total = 0.0
    for t, i in pairs:

        def kin(other: int, t: int = t, i: int = i) -> bool:
            return bool(batch.text_id[other] == batch.text_id[t]) or int(batch.image_index[other]) == i

        others_i = {j for _, j in pairs} | {j for j in range(len(image)) if batch.image_valid[j]}
        no_negative = {j for u, j in pairs if kin(u)}
        images = [i, *sorted(others_i - no_negative - {i})]
        texts = [t, *(u for u, _ in pairs if not kin(u))]
        to_image = torch.stack([scale * text[t] @ image[j] for j in images])
        to_text = torch.stack([scale * image[i] @ text[u] for u in texts])
        total += 0.5 * float((-to_image.log_softmax(0)[0] - to_text.log_softmax(0)[0]).detach())
    return total


RAGGED = {
    "several captions of an image": batch_of([0, 0, 1, 2, 2, 3], images=4),
    "equal captions of two images": batch_of([0, 1, 2, 3], [7, 8, 7, 9], images=4),
    "image without text, text without image": batch_of([0, 2, -1, 3], images=4),
    "masked slots": batch_of([0, 1, 2, 3], images=4, masked_images=(1,), masked_texts=(1,)),
    "one pair": batch_of([0], images=1),
}


@pytest.mark.parametrize("kind", RAGGED)
def test_itc_on_ragged_batches_is_the_formula(kind):
    batch = RAGGED[kind]
    image, text = unit(len(batch.images), 2), unit(len(batch.tokens), 3)
    found = ITC(ITC.Config(), WIDTHS)(Given(image, text, scale=5.0), batch)
    assert found.total.item() == pytest.approx(by_hand_itc(image, text, batch, 5.0), rel=1e-12, abs=1e-12)
    assert ITC(ITC.Config(), WIDTHS).denominator(batch).item() == int(batch.pair_valid.sum())


@pytest.mark.parametrize("kind", RAGGED)
def test_siglip_on_ragged_batches_is_the_formula(kind):
    batch = RAGGED[kind]
    image, text = unit(len(batch.images), 2), unit(len(batch.tokens), 3)
    encodings = Given(image, text, scale=5.0, bias=-2.0)
    found = SigLIP(SigLIP.Config(), WIDTHS)(encodings, batch).total.item()
    total = 0.0
    for t in range(len(text)):
        for i in range(len(image)):
            if batch.pair_valid[t] and batch.image_valid[i]:
                says = any(
                    batch.pair_valid[u]
                    and int(batch.image_index[u]) == i
                    and (batch.text_id[u] == batch.text_id[t])
                    for u in range(len(text))
                )
                sign = 1.0 if says or int(batch.image_index[t]) == i else -1.0
                total -= float(F.logsigmoid(sign * (5.0 * text[t] @ image[i] - 2.0)).detach())
    assert found == pytest.approx(total, rel=1e-12, abs=1e-12)


def test_siglip_starts_at_the_prior():
    """Algorithm 1: with bias -10 far-apart negatives cost almost nothing (the paper's equation would not)."""
    axes = torch.eye(16, dtype=torch.float64)
    encodings = Given(axes[:8].requires_grad_(), axes[:8].clone().requires_grad_(), scale=10.0, bias=-10.0)
    total = SigLIP(SigLIP.Config(), WIDTHS)(encodings, batch_of(list(range(8)), images=8)).total.item()
    assert total == pytest.approx(8 * math.log(2) + 56 * math.log1p(math.exp(-10)), rel=1e-12)


def test_label_smoothing_is_that_of_torch_where_nothing_is_excluded():
    image, text = unit(12, 0), unit(12, 1)
    objective = ITC(ITC.Config(smoothing=0.1), WIDTHS)
    ours = objective(Given(image, text, scale=7.0), batch_of(list(range(12)), images=12)).total
    logits, target = 7.0 * text @ image.T, torch.arange(12)
    theirs = sum(F.cross_entropy(m, target, label_smoothing=0.1, reduction="sum") for m in (logits, logits.T))
    assert isinstance(theirs, torch.Tensor)
    torch.testing.assert_close(ours, theirs / 2, rtol=1e-12, atol=0)
    for mine, reference in zip(
        torch.autograd.grad(ours, [image, text]), torch.autograd.grad(theirs / 2, [image, text]), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-14)


def test_the_product_is_exact_under_autocast_and_low_matmul_precision():
    rows, columns = unit(64, 4).detach().float(), unit(64, 5).detach().float()
    reference = rows.double() @ columns.double().T
    matmul: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            leaf = rows.clone().requires_grad_()
            product = similarity(leaf, columns)
            (100 * product).logsumexp(1).sum().backward()
            assert (rows @ columns.T).dtype == torch.bfloat16
    finally:
        matmul.fp32_precision = before
    assert product.dtype == torch.float32
    assert (product - reference).abs().max() < 1e-6
    slope = 100 * (100 * reference).softmax(1) @ columns.double()
    assert leaf.grad is not None
    assert (leaf.grad - slope).norm() / slope.norm() < 1e-5


def test_a_second_contrastive_objective_owns_its_temperature():
    lent, own = (
        SigLIP(SigLIP.Config(), WIDTHS),
        SigLIP(
            SigLIP.Config(),
            Widths(embed=16, image_tokens=1, text_tokens=1, vocabulary=1, temperature=False, contrast=False),
        ),
    )
    assert list(lent.parameters()) == []
    scale, bias = own.own_temperature(Given(unit(1, 0), unit(1, 1), scale=3.0))
    assert scale.item() == pytest.approx(10.0)
    assert bias.item() == -10.0
    logit_scale = own.own_temperature.logit_scale
    assert logit_scale is not None
    logit_scale.data.fill_(9.0)
    own.clamp()
    assert logit_scale.exp().item() == pytest.approx(100.0)
