from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.distributed import Ranks
from pretrain.evaluate import retrieval
from pretrain.evaluate.retrieval import KS, recalls


def ragged(images: int, *, equal: bool = False, ties: bool = False) -> dict[str, Any]:
    """Images with 0 to 4 texts each, the texts in no order; some captions equal, some embeddings too."""
    random = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(images, 8, generator=random), dim=1)
    owner = torch.arange(images).repeat_interleave(torch.randint(0, 5, (images,), generator=random))
    owner = owner[torch.randperm(len(owner), generator=random)]
    text = F.normalize(image[owner] + 0.6 * torch.randn(len(owner), 8, generator=random), dim=1)
    if ties:
        image[1::2], text[1::2] = image[: len(image) // 2 * 2 : 2], text[: len(text) // 2 * 2 : 2]
    known = len(owner) // 4 if equal else 10**6
    return {"images": image, "texts": text, "owner": owner, "text_id": torch.arange(len(owner)) % known * 7}


def right_answers(data: dict[str, Any]) -> Tensor:
    """(B, N) bool, from the definition: its own texts, and those that say what one of its own says."""
    same = data["text_id"][:, None] == data["text_id"]
    own = data["owner"] == torch.arange(len(data["images"]))[:, None]
    return (own.float() @ same.float()) > 0


@pytest.mark.parametrize("equal", [False, True])
def test_recall_is_the_hit_rate_of_torchmetrics(equal):
    from torchmetrics.retrieval import RetrievalHitRate

    data = ragged(60, equal=equal)
    found = recalls(**data)
    similarity, right = data["images"] @ data["texts"].T, right_answers(data)
    assert not right.any(1).all(), "no image without a text is among them"
    for name, scores, good in [
        ("image_to_text_recall", similarity, right),
        ("text_to_image_recall", similarity.T, right.T),
    ]:
        queries = torch.arange(len(scores))[:, None].expand_as(scores)
        for k in KS:
            rate = RetrievalHitRate(top_k=k, empty_target_action="skip")
            rate.update(scores.flatten(), good.flatten(), indexes=queries.flatten())
            assert found[f"{name}@{k}"] == pytest.approx(rate.compute().item())
    assert 0.05 < found["text_to_image_recall@1"] < 0.95


def test_an_equal_caption_of_another_image_is_a_right_answer():
    image = torch.eye(3)
    text = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # 0 and 1 are swapped
    different = recalls(image, text, owner=torch.arange(3), text_id=torch.tensor([1, 2, 3]))
    equal = recalls(image, text, owner=torch.arange(3), text_id=torch.tensor([1, 1, 3]))
    assert different["image_to_text_recall@1"] == pytest.approx(1 / 3)
    assert equal["image_to_text_recall@1"] == 1.0
    assert equal["text_to_image_recall@1"] == 1.0


def test_of_fewer_answers_than_k_all_are_looked_at():
    data = ragged(3)
    found = recalls(**data)
    assert found["text_to_image_recall@5"] == found["text_to_image_recall@10"] == 1.0
    alone = recalls(torch.ones(1, 2), torch.ones(1, 2), owner=torch.tensor([0]), text_id=torch.tensor([5]))
    assert set(alone.values()) == {1.0}


def test_a_tie_is_at_best_a_hit_and_at_worst_a_miss():
    data = ragged(60, ties=True)
    right = right_answers(data).T
    scores = (data["texts"] @ data["images"].T).double()
    best = scores.where(right, -9).amax(1, keepdim=True)
    before = ((scores > best + 1e-6) & ~right).sum(1)
    beside = ((scores > best - 1e-6) & ~right).sum(1)
    found = recalls(**data)
    for k in KS:
        least, most = ((rank < k).double().mean().item() for rank in (beside, before))
        assert least <= found[f"text_to_image_recall@{k}"] <= most
    assert (before != beside).any(), "there is no tie among them"


def recalls_of_a_share(ranks: Ranks, *, images: int, ties: bool) -> dict[str, float]:
    retrieval._QUERIES = 7
    return recalls(**ragged(images, equal=True, ties=ties), ranks=ranks)


@pytest.mark.parametrize(("images", "ties"), [(50, False), (50, True), (2, False)])
def test_any_number_of_ranks_finds_the_same(pool, monkeypatch, images, ties):
    monkeypatch.setattr(retrieval, "_QUERIES", 7)
    expected = recalls(**ragged(images, equal=True, ties=ties))
    for world in (1, 2, 4):
        found = pool.run(recalls_of_a_share, world, images=images, ties=ties)
        assert found == [expected] * world


def test_memory_is_that_of_a_block(monkeypatch):
    monkeypatch.setattr(retrieval, "_SCORES", 1000)
    sizes: list[int] = []
    exact = retrieval.similarity

    def watched(rows: Tensor, columns: Tensor) -> Tensor:
        sizes.append(len(rows) * len(columns))
        return exact(rows, columns)

    monkeypatch.setattr(retrieval, "similarity", watched)
    data = ragged(80, equal=True)
    in_blocks = recalls(**data)
    assert max(sizes) <= 1000
    assert len(sizes) > 10
    monkeypatch.undo()
    assert in_blocks == recalls(**data)
