import math

import pytest
import torch

from pretrain.evaluate.cider import cider_d


def sentences(count: int, *, seed: int, words: int = 12, longest: int = 14) -> list[list[str]]:
    """Random ones, some without a word, of words with unequal frequencies."""
    random = torch.Generator().manual_seed(seed)
    frequency = 1 / torch.arange(1.0, words + 1)
    lengths = torch.randint(0, longest, (count,), generator=random).tolist()
    return [
        [
            f"w{place}"
            for place in torch.multinomial(frequency, n, replacement=True, generator=random).tolist()
        ]
        if n
        else []
        for n in lengths
    ]


def test_three_images_by_hand():
    # `x` is said of every image and weighs nothing; every other word is said of one image and weighs ln 3.
    references = [[["x", "a", "b"]], [["x", "c", "d"]], [["x", "e", "f"], ["x"]]]
    captions = [["x", "a", "b"], ["x", "c", "c"], ["e", "f"]]
    found = cider_d(captions, references)
    # The same sentence: cosine 1 for n = 1, 2, 3, and there is no n = 4.
    assert found[0] == pytest.approx(10 * 3 / 4)
    # n = 1: (2) against (1, 1), clipped to 1 x 1 / (2 sqrt 2). n = 2: x c, of {x c, c c} and {x c, c d}.
    assert found[1] == pytest.approx(10 * (1 / (2 * math.sqrt(2)) + 1 / 2) / 4)
    # Against x e f: n = 1: 1; n = 2: e f of {x e, e f}: 1 / sqrt 2; one word short. Against x alone: nothing.
    assert found[2] == pytest.approx(10 * (1 + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72) / 2)


def test_it_is_that_of_the_coco_caption_evaluation():
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    captions = sentences(60, seed=0)
    pool = sentences(400, seed=1)
    references = [pool[at * 5 : at * 5 + 1 + at % 5] for at in range(60)]
    right = {at: [" ".join(words) for words in each] for at, each in enumerate(references)}
    said = {at: [" ".join(words)] for at, words in enumerate(captions)}
    mean, each = cider.Cider().compute_score(right, said)
    found = cider_d(captions, references)
    assert found == pytest.approx(each.tolist())
    assert sum(found) / len(found) == pytest.approx(mean)
    assert 0.1 < mean < 9


@pytest.mark.parametrize("references", [[[["a", "b"]]], [[[]]], [[[], ["a"]]]])
@pytest.mark.parametrize("caption", [["a", "b"], []])
def test_in_a_set_of_one_image_nothing_is_rare(caption, references):
    assert cider_d([caption], references) == [0.0]
