import pytest
import torch

from pretrain.evaluate.caption import caption_metrics, exact_match, words

WORDS = ["a", "dog", "cat", "the", "red", "runs", "over", "under", "grass", "don't", "it's", "t-shirt", ","]


def captions(count: int, *, seed: int) -> list[str]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=random).tolist()
    return [
        " ".join(WORDS[at] for at in torch.randint(len(WORDS), (length,), generator=random).tolist()) + "."
        for length in lengths
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('A man -- "Joe" -- holds: a sign; (red), too...', "a man joe holds a sign red too"),
        ("It's the dogs' ball, isn't it?", "it 's the dogs ball is n't it"),
        ("They\u2019re at 10:30 with 1,000 T-shirts", "they 're at 10:30 with 1,000 t-shirts"),
        ("3.5 o'clock & 1/2", "3.5 o'clock & 1/2"),
        ("caf\u00e9 \u4e2d\u6587 [x] {y}", "caf\u00e9 \u4e2d\u6587 x y"),
        (" .,!? ", ""),
    ],
)
def test_words_are_those_of_coco_without_punctuation(text, expected):
    assert words(text) == expected.split()


def test_every_measure_is_that_of_the_coco_caption_evaluation():
    pytest.importorskip("pycocoevalcap.bleu.bleu")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    pool = captions(250, seed=1)
    references = [pool[at * 5 : at * 5 + 1 + at % 5] for at in range(50)]
    # Every other one begins as a reference does.
    said = [
        each[-1][:20] + one if place % 2 else one
        for place, (one, each) in enumerate(zip(captions(50, seed=0), references, strict=True))
    ]
    right = {at: [" ".join(words(one)) for one in each] for at, each in enumerate(references)}
    mine = {at: [" ".join(words(one))] for at, one in enumerate(said)}
    bleu = Bleu(4).compute_score(right, mine, verbose=0)[0]
    assert caption_metrics(said, references) == {
        "cider_d": pytest.approx(Cider().compute_score(right, mine)[0]),
        "bleu_1": pytest.approx(bleu[0], rel=1e-5),
        "bleu_4": pytest.approx(bleu[3], rel=1e-5),
        "rouge_l": pytest.approx(Rouge().compute_score(right, mine)[0]),
    }
    assert bleu[3] > 0.1


def test_rouge_has_the_precision_and_recall_of_torchmetrics():
    from torchmetrics.functional.text.rouge import rouge_score

    for said, reference in zip(captions(20, seed=2), captions(20, seed=3), strict=True):
        plain, right = " ".join(words(said)), " ".join(words(reference))
        found = rouge_score(plain, right, rouge_keys="rougeL", tokenizer=str.split, normalizer=str)
        precision, recall = (float(found[f"rougeL_{each}"]) for each in ("precision", "recall"))
        f = (1 + 1.44) * precision * recall / (recall + 1.44 * precision) if precision else 0.0
        assert caption_metrics([said], [[reference]])["rouge_l"] == pytest.approx(f)


def test_the_best_precision_and_the_best_recall_may_be_of_two_references():
    # All of the caption stands in the first, all of the second in the caption.
    assert caption_metrics(["a dog runs"], [["a big dog runs over grass", "a dog"]])["rouge_l"] == 1.0


def test_of_two_references_as_near_in_length_the_shorter_decides_whether_a_caption_is_short():
    assert caption_metrics(["a dog runs over"], [["a dog runs over grass", "a dog runs"]])["bleu_1"] == 1.0


def test_a_caption_that_is_its_reference_has_the_highest_score():
    said = ["a red dog runs over grass", "two cats sit under one tree"]
    found = caption_metrics(said, [[each, "something else"] for each in said])
    assert found == pytest.approx({"cider_d": 5.0, "bleu_1": 1.0, "bleu_4": 1.0, "rouge_l": 1.0})


@pytest.mark.parametrize("said", ["", "...", "a dog"])
@pytest.mark.parametrize("references", [[""], ["!", ""], ["a cat", ""]])
def test_nothing_said_is_a_low_score(said, references):
    found = caption_metrics([said], [references])
    assert all(0 <= value < 0.7 for value in found.values())
    assert found["bleu_4"] == 0


def test_a_caption_is_exact_when_it_equals_one_reference_up_to_case_and_spaces():
    said = ["A red  circle", "a blue ring", "a ring"]
    references = [("a red circle",), ("a blue star", "a blue ring"), ("a star",)]
    assert exact_match(said, references) == pytest.approx(2 / 3)
