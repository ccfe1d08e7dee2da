"""The tiled losses against the same formulas on whole matrices in float64: values, gradients, hits, memory.

n pairs, B images, G texts, D width.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.batch import Batch
from objectives import strips
from objectives.base import IMAGE, TEXT, Objective, Widths
from objectives.itc import ITC
from objectives.siglip import SigLIP

WIDTHS = Widths(embed=16, image_tokens=1, text_tokens=1, vocabulary=1, temperature=True, contrast=False)


class Given(SimpleNamespace):
    """Encodings that are simply there."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __getitem__(self, wanted):
        return {IMAGE: self.image, TEXT: self.text}[wanted]


def given(image: Tensor, text: Tensor, scale: float, bias: float | None = None) -> Any:
    def temperature(value: float) -> Tensor:
        return torch.tensor(
            [value], dtype=torch.promote_types(image.dtype, torch.float32), requires_grad=True
        )

    return Given(
        group=None,
        image=image,
        text=text,
        logit_scale=temperature(math.log(scale)),
        logit_bias=None if bias is None else temperature(bias),
    )


def batch_of(image_index: Tensor, text_id: Tensor, image_valid: Tensor, text_valid: Tensor) -> Any:
    """What contrast reads of a batch."""
    readable = torch.cat([image_valid, image_valid.new_zeros(1)])
    return SimpleNamespace(
        images=torch.zeros(len(image_valid), 0),
        image_valid=image_valid,
        tokens=torch.zeros(len(text_id), 0),
        image_index=image_index,
        text_id=text_id,
        pair_valid=text_valid & readable[image_index],
    )


def messy(images: int, texts: int, captions: int, seed: int) -> Any:
    """Several captions of an image, images and texts without, masked slots, captions that recur anywhere."""
    random = torch.Generator().manual_seed(seed)

    def numbers(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=random)

    return batch_of(
        image_index=numbers(-1, images, texts),
        text_id=numbers(0, captions, texts) * 10**15,
        image_valid=numbers(0, 8, images) > 0,
        text_valid=numbers(0, 8, texts) > 0,
    )


def plain(pairs: int) -> Any:
    here = torch.arange(pairs)
    return batch_of(here, here, torch.ones(pairs, dtype=torch.bool), torch.ones(pairs, dtype=torch.bool))


def features(rows: int, seed: int, width: int = 16) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=random, dtype=torch.float64), dim=-1)


def kinship(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) texts of valid pairs, (n, B) and (n, G) bool: images and texts that are kin of each pair."""
    own = batch.pair_valid.nonzero().squeeze(1)
    same_text = batch.text_id[own, None] == batch.text_id
    same_image = batch.image_index[own, None] == batch.image_index
    kin_texts = (same_text | same_image) & batch.pair_valid
    kin_images = torch.zeros(len(own), len(batch.images))
    kin_images.scatter_add_(1, batch.image_index.clamp(min=0).expand(len(own), -1), kin_texts.float())
    return own, kin_images > 0, kin_texts


def dense_itc(encodings: Any, batch: Any, smoothing: float) -> tuple[Tensor, float]:
    """Sum over pairs and hits, from the whole matrix."""
    own, kin_images, kin_texts = kinship(batch)
    target = batch.image_index[own]
    scale = encodings.logit_scale.exp()
    total, hits = 0.0 * (scale + encodings.image.sum() + encodings.text.sum()).sum(), 0.0
    if not len(own):
        return total, hits
    for rows, columns, kin, at, valid in (
        (encodings.text[own], encodings.image, kin_images, target, batch.image_valid),
        (encodings.image[target], encodings.text, kin_texts, own, batch.pair_valid),
    ):
        excluded = (kin | ~valid).scatter(1, at[:, None], False)
        logits = (scale * rows @ columns.T).masked_fill(excluded, -torch.inf)
        share = logits.log_softmax(1)
        spread = share.masked_fill(excluded, 0).sum(1) / (~excluded).sum(1)
        total = (
            total
            - 0.5 * ((1 - smoothing) * share.gather(1, at[:, None]).squeeze(1) + smoothing * spread).sum()
        )
        hits += 0.5 * float((logits.argmax(1) == at).sum())
    return total, hits


def dense_siglip(encodings: Any, batch: Any, smoothing: float) -> tuple[Tensor, float]:
    own, positive, _ = kinship(batch)
    logits = encodings.logit_scale.exp() * encodings.text[own] @ encodings.image.T + encodings.logit_bias
    loss = -F.logsigmoid(torch.where(positive, logits, -logits)).masked_fill(~batch.image_valid, 0)
    if not len(own):
        return loss.sum(), 0.0
    best = logits.masked_fill(~batch.image_valid, -torch.inf).argmax(1, keepdim=True)
    return loss.sum(), float(positive.gather(1, best).sum())


BATCHES = {
    "plain": plain(11),
    "few captions": messy(9, 23, 3, 0),
    "some captions": messy(20, 30, 25, 1),
    "own captions": messy(12, 25, 10**6, 2),
    "one caption": messy(9, 12, 1, 3),
    "more images": messy(40, 7, 4, 4),
    "no pair": batch_of(torch.tensor([-1, 0]), torch.tensor([4, 5]), torch.arange(3) > 0, torch.ones(2) > 0),
    "nothing": plain(0),
}
KINDS: dict[str, tuple[Objective, Any, float]] = {
    "itc": (ITC(ITC.Config(), WIDTHS), dense_itc, 0.0),
    "itc, smooth": (ITC(ITC.Config(smoothing=0.2), WIDTHS), dense_itc, 0.2),
    "siglip": (SigLIP(SigLIP.Config(), WIDTHS), dense_siglip, 0.0),
}


@pytest.fixture(params=[(512, 2048), (3, 4), (1, 1)], ids=str)
def shape(request, monkeypatch):
    monkeypatch.setattr(strips, "tile_shape", lambda device: request.param)


@pytest.mark.parametrize("which", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_any_shape_have_loss_gradients_and_hits_of_the_whole_matrix(shape, kind, which):
    objective, dense, smoothing = KINDS[kind]
    batch = BATCHES[which]
    image = features(len(batch.images), 5).requires_grad_()
    text = features(len(batch.tokens), 6).requires_grad_()
    encodings = given(image, text, 8.0, -3.0)
    leaves = [image, text, encodings.logit_scale, *([encodings.logit_bias] if kind == "siglip" else [])]
    expected, hits = dense(encodings, batch, smoothing)
    wanted = torch.autograd.grad(expected, leaves)
    terms = objective(encodings, batch)
    torch.testing.assert_close(terms.total, expected, rtol=1e-12, atol=1e-12)
    assert terms.metrics["accuracy"] == hits
    for found, reference in zip(torch.autograd.grad(terms.total, leaves), wanted, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-12)


def test_the_awkward_batches_are_awkward():
    """Images whose captions exclude differing texts, and masked slots: all are there."""
    messes = [batch for name, batch in BATCHES.items() if "caption" in name]
    assert max(len(strips_of(batch).base) for batch in messes) >= 10
    assert all(not batch.pair_valid.all() and not batch.image_valid.all() for batch in messes)
    assert not BATCHES["no pair"].pair_valid.any()
    assert strips_of(BATCHES["plain"]).column is None


def strips_of(batch: Any) -> Any:
    from objectives.contrast import block

    return block(given(features(len(batch.images), 5), features(len(batch.tokens), 6), 1.0), batch, "exact")


@pytest.mark.parametrize("frozen", ["image", "text", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_side_changes_nothing_for_the_other(kind, frozen):
    objective, dense, smoothing = KINDS[kind]
    batch = BATCHES["some captions"]
    image, text = features(20, 5), features(30, 6)
    encodings = given(image, text, 8.0, -3.0)
    leaves = [encodings.logit_scale, *([encodings.logit_bias] if kind == "siglip" else [])]
    leaves += [] if frozen == "both" else [text if frozen == "image" else image]
    for leaf in leaves:
        leaf.requires_grad_()
    wanted = torch.autograd.grad(dense(encodings, batch, smoothing)[0], leaves)
    for found, reference in zip(
        torch.autograd.grad(objective(encodings, batch).total, leaves), wanted, strict=True
    ):
        torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-12)


def test_without_gradient_there_is_one_pass_and_a_gradient_is_taken_once(monkeypatch):
    products: list[int] = []
    batch, image, text = plain(8), features(8, 0).requires_grad_(), features(8, 1)
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **more: (products.append(1), mm(*args, **more))[1])
    with torch.no_grad():
        quiet = ITC(ITC.Config(), WIDTHS)(given(image, text, 8.0), batch).total
    assert len(products) == 1
    total = ITC(ITC.Config(), WIDTHS)(given(image, text, 8.0), batch).total
    assert len(products) == 3
    assert total.item() == quiet.item()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        total.backward()


def dense_in_float64(kind: str, image: Tensor, text: Tensor) -> Tensor:
    image, text = image.double().requires_grad_(), text.double().requires_grad_()
    encodings = given(image, text, 100.0, -10.0)
    return torch.cat(torch.autograd.grad(KINDS[kind][1](encodings, plain(len(image)), 0.0)[0], [image, text]))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("alike", "bar"), [(0.0, 2e-6), (0.3, 3e-6), (0.45, 2e-5)])
@pytest.mark.parametrize("kind", ["itc", "siglip"])
def test_gradients_at_scale_100_are_exact_also_under_autocast(kind, alike, bar, autocast):
    image = features(1024, 0, 512).float()
    text = F.normalize(alike * image + math.sqrt(1 - alike**2) * features(1024, 1, 512).float(), dim=-1)
    reference = dense_in_float64(kind, image, text)
    image.requires_grad_()
    text.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total = KINDS[kind][0](given(image, text, 100.0, -10.0), plain(1024)).total
    found = torch.cat(torch.autograd.grad(total, [image, text])).double()
    error = (found - reference).norm() / reference.norm()
    assert error <= bar
    assert total.dtype == torch.float32


def test_pairs_that_are_alike_beside_one_that_is_not():
    """Log-sum-exps of rows and columns 100 apart: neither overflows, nor is either lost."""
    image = features(64, 0, 512).float()
    text = image.clone()
    text[0] = -image[0]
    text[1] = features(1, 7, 512).float()
    reference = dense_in_float64("itc", image, text)
    encodings = given(image.requires_grad_(), text.requires_grad_(), 100.0)
    found = torch.cat(
        torch.autograd.grad(KINDS["itc"][0](encodings, plain(64)).total, [image, text])
    ).double()
    assert (found - reference).norm() <= 2e-5 * reference.norm()


def test_bfloat16_embeddings_have_bfloat16_gradients_and_exact_logits():
    image, text = features(32, 0).bfloat16().requires_grad_(), features(32, 1).bfloat16().requires_grad_()
    encodings = given(image, text, 20.0, -10.0)
    for objective, dense, smoothing in KINDS.values():
        total = objective(encodings, plain(32)).total
        wide = given(image.double(), text.double(), 20.0, -10.0)
        torch.testing.assert_close(total.double(), dense(wide, plain(32), smoothing)[0], rtol=1e-6, atol=0)
        assert torch.autograd.grad(total, image)[0].dtype == torch.bfloat16


def test_a_matrix_is_never_stored():
    """The largest tensor that is made is a tile or as large as the embeddings."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for each in made if isinstance(made, (tuple, list)) else [made]:
                if isinstance(each, Tensor):
                    self.most = max(self.most, each.untyped_storage().nbytes())
            return made

    batch: Batch = plain(4096)
    image, text = features(4096, 0).float().requires_grad_(), features(4096, 1).float().requires_grad_()
    for kind in KINDS:
        with Largest() as largest:
            KINDS[kind][0](given(image, text, 8.0, -3.0), batch).total.backward()
        assert largest.most <= 2 * 512 * 2048 * 4  # the room of two tiles; the matrix is 67 MB
