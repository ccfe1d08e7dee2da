import pytest
import torch
import torch.nn.functional as F

from pretrain.evaluate.retrieval import KS, recalls


def embeddings(images: int, per_image: int):
    random = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(images, 8, generator=random), dim=1)
    owner = torch.arange(images).repeat_interleave(per_image)
    text = F.normalize(image[owner] + 1.2 * torch.randn(len(owner), 8, generator=random), dim=1)
    return image, text, owner


@pytest.mark.parametrize("per_image", [1, 5])
def test_recall_is_the_hit_rate_of_torchmetrics(per_image):
    from torchmetrics.retrieval import RetrievalHitRate

    image, text, owner = embeddings(60, per_image)
    found = recalls(image, text, owner=owner, text_id=torch.arange(len(text)))
    similarity = image @ text.T
    right = owner == torch.arange(len(image))[:, None]
    for k in KS:
        to_text, to_image = RetrievalHitRate(top_k=k), RetrievalHitRate(top_k=k)
        queries = torch.arange(len(image))[:, None].expand_as(similarity)
        to_text.update(similarity.flatten(), right.flatten(), indexes=queries.flatten())
        queries = torch.arange(len(text))[:, None].expand_as(similarity.T)
        to_image.update(similarity.T.flatten(), right.T.flatten(), indexes=queries.flatten())
        assert found[f"image_to_text_recall@{k}"] == pytest.approx(to_text.compute().item())
        assert found[f"text_to_image_recall@{k}"] == pytest.approx(to_image.compute().item())
    assert 0.05 < found["text_to_image_recall@1"] < 0.95


def test_an_equal_caption_of_another_image_is_a_right_answer():
    image = torch.eye(3)
    text = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # 0 and 1 are swapped
    different = recalls(image, text, owner=torch.arange(3), text_id=torch.tensor([1, 2, 3]))
    equal = recalls(image, text, owner=torch.arange(3), text_id=torch.tensor([1, 1, 3]))
    assert different["image_to_text_recall@1"] == pytest.approx(1 / 3)
    assert equal["image_to_text_recall@1"] == 1.0
    assert equal["text_to_image_recall@1"] == 1.0
