import pytest
import torch
import torch.nn.functional as F

from pretrain.evaluate.probe import linear_probe, logistic_regression, nearest_neighbours


def clusters(count: int, *, seed: int, noise: float, classes: int = 4, width: int = 6):
    """Features around one centre per class, on unequal scales, and their labels."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=random)
    features = centres[labels] + noise * torch.randn(count, width, generator=random)
    return features * 10.0 ** torch.linspace(-3, 2, width) + 5, labels


@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_where_regression_ends_the_gradient_is_zero(strength):
    features, labels = clusters(200, seed=0, noise=1.0)
    x = (features.double() - features.mean(0)) / features.std(0)
    with torch.no_grad():
        found = logistic_regression(x, labels, classes=4, strength=strength, steps=500)
    # Convex: there is one such place. The gradient is written out, not differentiated.
    wrong = (x @ found.weight + found.bias).softmax(1) - F.one_hot(labels, 4)
    gradient = x.T @ wrong / len(x) + strength * found.weight
    assert gradient.abs().max() < 2e-6
    assert wrong.mean(0).abs().max() < 2e-6
    assert found.weight.abs().max() > 0.1


def test_regression_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clusters(200, seed=0, noise=1.0)
    x = (features.double() - features.mean(0)) / features.std(0)
    found = logistic_regression(x, labels, classes=4, strength=0.01, steps=500)
    other = linear_model.LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8, max_iter=1000).fit(x, labels)
    torch.testing.assert_close(found.weight.T, torch.tensor(other.coef_), rtol=1e-3, atol=1e-4)


def test_a_probe_comes_near_the_best_there_is():
    train, train_labels = clusters(1000, seed=0, noise=1.2)
    test, test_labels = clusters(1000, seed=1, noise=1.2)
    found = linear_probe(train, train_labels, test, test_labels)
    assert found == linear_probe(train, train_labels, test, test_labels)
    # With equal clusters nothing beats the nearest true centre.
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    scale = 10.0 ** torch.linspace(-3, 2, 6)
    bayes = (torch.cdist((test - 5) / scale, centres).argmin(1) == test_labels).double().mean().item()
    assert 0.6 < bayes < 0.95
    assert found == pytest.approx(bayes, abs=0.02)


@pytest.mark.parametrize("kind", ["mostly noise", "hidden in a difference"])
def test_the_penalty_is_chosen_by_what_it_does_to_other_images(kind):
    random = torch.Generator().manual_seed(0)
    features, labels = torch.randn(1300, 100, generator=random), torch.arange(1300) % 2
    if kind == "mostly noise":  # a weak penalty learns it
        features[:, :4] += labels[:, None]
    else:  # a strong one does not let the weights grow to what tells the classes
        features = features[:, :2]
        features[:, 1] = features[:, 0] + 0.05 * features[:, 1] + 0.2 * labels
    train, test = features[:300], features[300:]
    x, y = ((each.double() - train.double().mean(0)) / train.double().std(0) for each in (train, test))
    ends = [
        logistic_regression(x, labels[:300], classes=2, strength=strength, steps=1000)
        for strength in (10.0, 1e-7)
    ]
    accuracies = [end.accuracy(y, labels[300:]) for end in ends]
    assert max(accuracies) - min(accuracies) > 0.05
    assert linear_probe(train, labels[:300], test, labels[300:]) > max(accuracies) - 0.01


def test_unlabelled_images_are_left_out():
    train, train_labels = clusters(200, seed=0, noise=0.5)
    test, test_labels = clusters(100, seed=1, noise=0.5)
    expected = linear_probe(train, train_labels, test, test_labels)
    neighbours = nearest_neighbours(train, train_labels, test)
    more, none = torch.full((3, 6), 1e4), torch.full((3,), -1)
    train, train_labels = torch.cat([more, train]), torch.cat([none, train_labels])
    found = linear_probe(train, train_labels, torch.cat([test, more]), torch.cat([test_labels, none]))
    assert found == expected
    assert nearest_neighbours(train, train_labels, test).equal(neighbours)


def test_features_that_say_nothing_give_the_commonest_class():
    labels = torch.tensor([0, 1, 1, 1, 2, 1])
    assert linear_probe(torch.ones(6, 3), labels, torch.ones(4, 3), torch.tensor([1, 0, 2, 3])) == 0.25


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_neighbours_vote_by_their_nearness(k):
    train, train_labels = clusters(80, seed=0, noise=1.0)
    test, _ = clusters(40, seed=1, noise=1.0)
    found = nearest_neighbours(train, train_labels, test, k=k, temperature=0.2)
    for image, predicted in zip(test, found.tolist(), strict=True):
        near = sorted(
            ((float(F.cosine_similarity(image, other, dim=0)), int(label))
             for other, label in zip(train, train_labels, strict=True)), reverse=True,
        )[:k]  # fmt: skip
        votes = [sum(torch.tensor(s / 0.2).exp() for s, label in near if label == c) for c in range(4)]
        assert predicted == max(range(4), key=votes.__getitem__)
