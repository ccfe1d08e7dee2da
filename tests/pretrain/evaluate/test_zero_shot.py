from typing import Any

import pytest
import torch

from pretrain.evaluate.caption import exact_match
from pretrain.evaluate.judge import Judge
from pretrain.evaluate.zero_shot import predict, top1


class Fixed(Judge):
    """A judge whose embeddings are given."""

    def __init__(self) -> None:
        """No model: the embeddings are written in the batch and in the sentences."""

    def images(self, batch: Any) -> Any:
        return batch

    def sentences(self, sentences):
        return torch.tensor([[float(number) for number in sentence.split()] for sentence in sentences])


def test_a_class_scores_as_its_best_prompt():
    prompts = [("1 0", "-9 -9"), ("0 1",)]  # the mean of class 0 would lose to class 1 everywhere
    images = torch.tensor([[1.0, 0.2], [0.1, 1.0]])
    batches: list[Any] = [images[:1], images[1:]]
    assert predict(Fixed(), batches, prompts).tolist() == [0, 1]


def test_top1_counts_only_the_images_of_the_classes_asked_for():
    predicted, labels = torch.tensor([0, 1, 1, 3]), torch.tensor([0, 1, 2, 2])
    assert top1(predicted, labels, [0, 1]) == 1.0
    assert top1(predicted, labels, [2]) == 0.0
    assert top1(predicted, labels, [0, 1, 2]) == pytest.approx(0.5)


def test_a_caption_is_exact_when_it_equals_one_reference_up_to_case_and_spaces():
    said = ["A red  circle", "a blue ring", "a ring"]
    references = [("a red circle",), ("a blue star", "a blue ring"), ("a star",)]
    assert exact_match(said, references) == pytest.approx(2 / 3)
