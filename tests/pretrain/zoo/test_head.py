import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.zoo import head as module
from pretrain.zoo.head import ColumnHead, VocabularyHead


def make(dtype=torch.float64, *, M=37, width=8, vocabulary=11, columns=False):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, width, dtype=dtype, generator=generator)
    parameter = torch.nn.Parameter(weight.T.contiguous() if columns else weight)
    head = ColumnHead(parameter) if columns else VocabularyHead(parameter)
    states = torch.randn(M, width, dtype=dtype, generator=generator).requires_grad_()
    return head, states, torch.randint(vocabulary, (M,), generator=generator)


def reference(head, states, targets, smoothing, z_loss=0.0):
    logits = states @ head.matrix.T
    loss = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    return loss + z_loss * logits.logsumexp(dim=1).square().sum(), logits


def in_pieces(monkeypatch, *, rows, columns):
    """So many states and words at a time."""
    monkeypatch.setattr(module, "_ROWS", rows)
    monkeypatch.setattr(module, "_LOGITS", 1)
    monkeypatch.setattr(module, "_COLUMNS", columns)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(("rows", "words"), [(1, 11), (5, 4), (37, 1), (1000, 1000)])
@pytest.mark.parametrize("columns", [False, True])
def test_loss_and_gradients_are_those_of_cross_entropy(smoothing, z_loss, rows, words, columns, monkeypatch):
    head, states, targets = make(columns=columns)
    in_pieces(monkeypatch, rows=rows, columns=words)
    expected, logits = reference(head, states, targets, smoothing, z_loss)
    wanted = torch.autograd.grad(3 * expected, (states, head.weight))
    loss, hits = head(states, targets, smoothing=smoothing, z_loss=z_loss)
    found = torch.autograd.grad(3 * loss, (states, head.weight))
    assert loss.shape == hits.shape == ()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0, check_dtype=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert hits == (logits.argmax(1) == targets).sum()
    assert not hits.requires_grad


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_float32_is_near_float64_however_sure_the_head_is(autocast, scale, monkeypatch):
    head, states, targets = make(torch.float32, M=64, width=32, vocabulary=500)
    states = (scale * states).detach()
    if autocast:  # what bfloat16 products can know
        states, head = states.bfloat16().float(), VocabularyHead(nn.Parameter(head.weight.bfloat16().float()))
    states.requires_grad_()
    exact = VocabularyHead(nn.Parameter(head.weight.detach().double()))
    double = states.detach().double().requires_grad_()
    expected, _ = reference(exact, double, targets, 0.1, 1e-5)
    expected.backward()
    in_pieces(monkeypatch, rows=16, columns=128)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = head(states, targets, smoothing=0.1, z_loss=1e-5)
    loss.backward()
    assert abs(loss.item() - expected.item()) < (1e-2 if autocast else 1e-6) * expected.item()
    for found, wanted in ((states.grad, double.grad), (head.weight.grad, exact.weight.grad)):
        assert found is not None
        assert wanted is not None
        assert found.dtype == torch.float32
        # A logit of 500 is known to 3e-5 in float32: so is its probability.
        assert (found - wanted).norm() < (2e-2 if autocast else 1e-5) * wanted.norm()


def test_no_logits_of_the_whole_batch_exist(monkeypatch):
    head, states, targets = make(M=64, width=3)
    in_pieces(monkeypatch, rows=4, columns=11)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[-1] == 11:
                largest = max(largest, out.shape[0])
            return out

    with Watch():
        head(states, targets, smoothing=0.1)[0].backward()
    assert largest == 4


def test_backward_gives_its_gradient_away_without_a_copy():
    head, states, targets = make(M=64, width=24)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == head.weight.shape:
                sizes.append(out.data_ptr())
            return out

    loss, _ = head(states, targets)
    with Watch():
        loss.backward(retain_graph=True)
    assert head.weight.grad is not None
    assert set(sizes) == {head.weight.grad.data_ptr()}
    with pytest.raises(RuntimeError, match="given away by its first backward"):
        loss.backward()


@pytest.mark.parametrize("frozen", ["states", "weight"])
def test_what_is_frozen_costs_no_product(frozen):
    head, states, targets = make()
    (wanted,) = torch.autograd.grad(head(states, targets)[0], head.weight if frozen == "states" else states)
    (states if frozen == "states" else head.weight).requires_grad_(False)
    products = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal products
            products += "mm" in str(function)
            return function(*args, **(kwargs or {}))

    with Count():
        head(states, targets)[0].backward()
    assert products == 2
    found = (head.weight if frozen == "states" else states).grad
    assert found is not None
    assert torch.equal(found, wanted)


def test_a_matrix_of_columns_is_read_where_it_lies_and_its_gradient_lies_likewise():
    rows, states, targets = make()
    head, *_ = make(columns=True)
    assert head.matrix.data_ptr() == head.weight.data_ptr()
    assert torch.equal(head.matrix, rows.weight)
    torch.testing.assert_close(head.logits(states), rows.logits(states))
    head(states, targets, smoothing=0.1)[0].backward()
    assert head.weight.grad is not None
    assert head.weight.grad.stride() == head.weight.stride()


def test_nothing_to_score_costs_nothing():
    head, states, targets = make(M=0)
    loss, hits = head(states, targets, smoothing=0.1)
    (d_weight,) = torch.autograd.grad(loss, head.weight)
    assert loss == 0
    assert hits == 0
    assert d_weight.abs().max() == 0


def test_under_autocast_the_softmax_stays_float32():
    head, states, targets = make(torch.float32, M=200)
    exact, _ = reference(head, states, targets, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head(states, targets, smoothing=0.1)
        assert head.logits(states).dtype == torch.float32
    gradients = torch.autograd.grad(loss, (states, head.weight))
    assert loss.dtype == gradients[0].dtype == gradients[1].dtype == torch.float32
    low = states.bfloat16().float() @ head.weight.bfloat16().float().T  # what bfloat16 products can know
    near = F.cross_entropy(low.bfloat16().float(), targets, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss, near, rtol=1e-5, atol=0)
    assert abs(loss - exact) / exact < 5e-3


def test_without_gradient_none_is_computed():
    head, states, targets = make()
    with torch.no_grad():
        loss, hits = head(states, targets, smoothing=0.0)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(head, states, targets, 0.0)[0].detach())
    assert 0 <= hits <= 37


def test_logits_keep_float64():
    head, states, _ = make()
    assert torch.equal(head.logits(states), states @ head.weight.T)
