"""What image features know of classes without any text: a linear probe and the nearest neighbours.

N training images, M test images, D feature width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from objectives.contrast import similarity
from pretrain.evaluate.retrieval import blocks

_STRENGTHS = tuple(10.0**exponent for exponent in range(1, -8, -1))
_PATIENCE = 2
"""Strengths in a row that do worse than the best before the weaker ones are left untried."""
_HELD_OUT = 5
"""One training image in so many."""
_SWEEP_STEPS = 200
_STEPS = 1000


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear classifier."""

    weight: Tensor
    """(D, C)"""
    bias: Tensor
    """(C,)"""

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of the images (M, D) that get their label (M,)."""
        return ((features @ self.weight + self.bias).argmax(1) == labels).double().mean().item()


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Share of test images that a logistic regression on the training features gets right.

    As CLIP does it (arXiv 2103.00020, A.3): L-BFGS of at most 1000 steps, the strength of the L2 penalty
    chosen on a held-out part of the training images, here to the power of ten. Features are standardised
    with the training images' mean and deviation. Images with label -1 are left out. The same input gives
    the same value.

    Args:
        train: (N, D) features, of two labelled images at least.
        train_labels: (N,) int64.
        test: (M, D) features, of one labelled image at least.
        test_labels: (M,) int64.
    """
    train, train_labels = train[train_labels >= 0], train_labels[train_labels >= 0]
    test, test_labels = test[test_labels >= 0], test_labels[test_labels >= 0]
    assert len(train) > 1, "a probe needs two labelled images to learn from"
    assert len(test) > 0, "a probe needs a labelled image to be judged by"
    # In float64, which the global matmul precision leaves alone.
    mean, deviation = train.double().mean(0), train.double().std(0).clamp(min=1e-8)
    train, test = (train.double() - mean) / deviation, (test.double() - mean) / deviation
    classes = int(train_labels.max()) + 1

    strength = _best_strength(train, train_labels, classes)
    model = logistic_regression(train, train_labels, classes=classes, strength=strength, steps=_STEPS)
    return model.accuracy(test, test_labels)


def _best_strength(train: Tensor, labels: Tensor, classes: int) -> float:
    """The penalty that does best on a held-out part; the strongest of equals."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
    held_out, kept = order.tensor_split([-(-len(train) // _HELD_OUT)])
    features, kept_labels = train[kept], labels[kept]
    model, best, best_accuracy, worse = None, _STRENGTHS[0], 0.0, 0
    # From strong to weak, each from the one before: the weaker the penalty, the longer a fit from zero.
    for strength in _STRENGTHS:
        model = logistic_regression(
            features, kept_labels, classes=classes, strength=strength, steps=_SWEEP_STEPS, start=model
        )
        accuracy = model.accuracy(train[held_out], labels[held_out])
        worse += accuracy < best_accuracy
        if accuracy > best_accuracy:
            best, best_accuracy, worse = strength, accuracy, 0
        if worse == _PATIENCE:
            break
    return best


@torch.enable_grad()
def logistic_regression(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    strength: float,
    steps: int,
    start: Linear | None = None,
) -> Linear:
    """The least of mean cross-entropy + strength / 2 x squared weights (not of the bias), by L-BFGS.

    Args:
        features: (N, D) float64.
        labels: (N,) int64.
        classes: C.
        strength: of the penalty.
        steps: at most so many; it ends earlier where the gradient is zero.
        start: where to begin; at zero by default.
    """
    start = start or Linear(features.new_zeros(features.shape[1], classes), features.new_zeros(classes))
    weight, bias = start.weight.clone().requires_grad_(), start.bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=steps,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features @ weight + bias, labels) + strength / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]  (it takes a Tensor)
    return Linear(weight.detach(), bias.detach())


def nearest_neighbours(
    train: Tensor, train_labels: Tensor, test: Tensor, *, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """The class of each test image by the votes of its k nearest training images, (M,) int64.

    A vote weighs exp(cosine / temperature) (Wu et al., arXiv 1805.01978, section 3.4; DINO takes the same
    k and temperature). Training images with label -1 are left out.

    Args:
        train: (N, D) features, of one labelled image at least.
        train_labels: (N,) int64.
        test: (M, D) features.
        k: how many vote; all, where there are fewer.
        temperature: the lower, the more the nearest decides.
    """
    train, train_labels = F.normalize(train[train_labels >= 0], dim=1), train_labels[train_labels >= 0]
    assert len(train) > 0, "neighbours need a labelled image to learn from"
    test = F.normalize(test, dim=1)
    classes = int(train_labels.max()) + 1
    found: list[Tensor] = []
    for rows in blocks(len(test), len(train)):
        nearest = similarity(test[rows], train).topk(min(k, len(train)), dim=1)
        weights = (nearest.values / temperature).exp()
        votes = weights.new_zeros(len(weights), classes)
        found.append(votes.scatter_add(1, train_labels[nearest.indices], weights).argmax(1))
    return torch.cat(found)
