"""CIDEr-D (arXiv 1411.5726): does a caption say what people say of this image and of few others?

I images, each with one caption and one or more references. A sentence is the sequence of its words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Words = Sequence[str]
_Gram = tuple[str, ...]

_LONGEST = 4
_SIGMA = 6.0


@dataclass(frozen=True, slots=True)
class _Vector:
    """A sentence as its n-grams, weighed by how often it uses them and how few images they are said of."""

    weights: dict[_Gram, float]
    norms: tuple[float, ...]
    """One for each n."""
    length: int


def cider_d(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """The CIDEr-D of each of I captions, from 0 to 10; that of the whole set is their mean.

    Cosines of tf-idf n-grams for n from 1 to 4, the caption's weight clipped at the reference's, a Gaussian
    penalty (sigma 6) on the difference in length, averaged over n and references, times 10. Document
    frequencies come from the references given here, so a score belongs to its set; in a set of one image
    every n-gram is said of every image and the score is 0. Papers print it times 100.
    """
    counted = [[_count(reference) for reference in right] for right in references]
    images_with = Counter(gram for right in counted for gram in {gram for one in right for gram in one})
    rarest = math.log(len(references))

    def weigh(counts: Counter[_Gram]) -> _Vector:
        # An n-gram of no reference is taken to be as rare as one of a single image.
        weights = {
            gram: count * (rarest - math.log(max(1, images_with[gram]))) for gram, count in counts.items()
        }
        squares = [0.0] * _LONGEST
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight**2
        length = sum(count for gram, count in counts.items() if len(gram) == 1)
        return _Vector(weights, tuple(map(math.sqrt, squares)), length)

    scores: list[float] = []
    for caption, right in zip(captions, counted, strict=True):
        said = weigh(_count(caption))
        scores.append(10 * sum(_similarity(said, weigh(counts)) for counts in right) / len(right))
    return scores


def _count(words: Words) -> Counter[_Gram]:
    """How often each n-gram occurs, for every n."""
    return Counter(
        tuple(words[at : at + n]) for n in range(1, _LONGEST + 1) for at in range(len(words) - n + 1)
    )


def _similarity(caption: _Vector, reference: _Vector) -> float:
    """The mean over n of the clipped cosines, less the penalty on length; from 0 to 1."""
    shared = [0.0] * _LONGEST
    for gram, weight in caption.weights.items():
        if gram in reference.weights:
            shared[len(gram) - 1] += min(weight, reference.weights[gram]) * reference.weights[gram]
    cosines = [
        product / (left * right) if product else 0.0
        for product, left, right in zip(shared, caption.norms, reference.norms, strict=True)
    ]
    penalty = math.exp(-((caption.length - reference.length) ** 2) / (2 * _SIGMA**2))
    return penalty * sum(cosines) / _LONGEST
