"""Candidates are everything that is no known positive, and their logits the similarity."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.batch import Batch
from objectives import candidates as module
from objectives.base import IMAGE, TEXT
from objectives.candidates import Strip, candidates
from pretrain.distributed import Ranks
from pretrain.testing import make_samples, merge, split

SCALE = torch.tensor([8.0], dtype=torch.float64)


class Given(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __getitem__(self, wanted: Any) -> Tensor:
        return {IMAGE: self.image, TEXT: self.text}[wanted]


def embedding(name: int) -> Tensor:
    random = torch.Generator().manual_seed(name % 2**31)
    return F.normalize(torch.randn(6, generator=random, dtype=torch.float64), dim=0)


def given(batch: Batch, group: Any = None) -> Any:
    images = [embedding(name) for name in batch.sample_id.tolist()]
    texts = [embedding(int(row @ torch.arange(1, len(row) + 1))) for row in batch.tokens]
    return Given(image=torch.stack(images), text=torch.stack(texts), group=group)


def whole() -> Batch:
    """Three images have one caption, one of them beside another of its own; some slots are masked."""
    batch = merge(make_samples(30))
    batch.text_id[batch.image_index == 10] = torch.tensor([1, 77])
    return batch


def reference(batch: Batch, toward: str, compared: bool) -> Tensor:
    """Logits of all pairs against all candidates, by a loop."""
    encodings, pairs = given(batch), batch.pair_valid.nonzero().squeeze(1).tolist()
    has = {(int(batch.image_index[t]), int(batch.text_id[t])) for t in pairs}
    logits = encodings.text @ encodings.image.T * (SCALE if compared else 0)
    for t in pairs:
        for image in range(len(batch.images)):
            if (image, int(batch.text_id[t])) in has:
                logits[t, image] = -torch.inf
    if toward == "image":
        return logits[pairs][:, batch.image_valid]
    return logits[:, batch.image_index[pairs]].T[:, batch.pair_valid]


def found(strips: list[Strip]) -> Tensor:
    return torch.cat([strip.logits for strip in strips])


@pytest.mark.parametrize("rows", [256, 4])
@pytest.mark.parametrize("compared", [True, False])
@pytest.mark.parametrize("toward", ["image", "text"])
def test_known_positives_are_left_out_and_nothing_else(toward, compared, rows, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", rows)
    batch = whole()
    strips = list(candidates(given(batch), batch, toward, SCALE if compared else None))
    assert torch.cat([strip.pairs for strip in strips]).equal(batch.pair_valid.nonzero().flatten())
    expected = reference(batch, toward, compared)
    torch.testing.assert_close(found(strips).double(), expected, rtol=1e-12, atol=0)
    assert 0 < int(expected.isinf().sum(1).min()) < int(expected.isinf().sum(1).max())


def on_ranks(ranks: Ranks, toward: Any) -> list[list[float]]:
    batch = split(make_samples(30), ranks, 1)[0]
    return found(list(candidates(given(batch, ranks.group), batch, toward, SCALE))).tolist()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("toward", ["image", "text"])
def test_every_rank_sees_the_candidates_of_all(pool, toward, world):
    parts = pool.run(on_ranks, world, toward=toward)
    expected = reference(merge(make_samples(30)), toward, True)
    together = torch.tensor([row for part in parts for row in part], dtype=torch.float64)
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=0)
