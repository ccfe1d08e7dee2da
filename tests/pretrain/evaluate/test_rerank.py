"""Retrieval in the order of a matcher, against its definition, and on any number of ranks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datasets.errors import UserError
from datasets.source import Source
from datasets.sources import open_source
from objectives.base import Pairs
from pretrain.distributed import Ranks
from pretrain.evaluate import rerank
from pretrain.evaluate.judge import Judge
from pretrain.evaluate.observe import Observed, observe
from pretrain.evaluate.rerank import reranked
from pretrain.evaluate.results import Results
from pretrain.evaluate.retrieval import KS, Right, nearest, recalls
from pretrain.testing import untrained_judge

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
FEW = 7
WAYS = ("image_to_text", "text_to_image")


class Head(nn.Module):
    """A matcher that is as sure as it is ignorant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head = nn.Linear(16, 1)
        nn.init.normal_(self.head.weight)

    def match_logit(self, states: Tensor) -> Tensor:
        return self.head(states).squeeze(1)


class Oracle(Judge):
    """It knows."""

    def match(self, image_tokens: Tensor, pairs: Pairs) -> Tensor:
        assert len(image_tokens) > int(pairs.image.max())
        return torch.where(pairs.matched, 9.0, -9.0)


@pytest.fixture(autouse=True)
def _few_pairs(monkeypatch):
    """Several rounds for each batch."""
    monkeypatch.setattr(rerank, "_PAIRS", FEW)


@pytest.fixture(scope="module")
def shard(tmp_path_factory, write_shard):
    """Of 23 images one is damaged, every fourth is left out for want of a text; some share captions."""

    def beside(place, colour):
        said = [f"number {place} is {colour}", f"a {colour} square", f"again {place // 2}"]
        return {"captions": said[: place % 4]}

    path = tmp_path_factory.mktemp("data") / "pairs.tar"
    return write_shard(path, 23, beside=beside, damaged=(5,))


def opened(shard: str) -> Source:
    return open_source(shard, seed=0, split="test")


def judge_of(*, rerank: int, kind: type[Judge] = Judge, batch: int = 6) -> Judge:
    judge = untrained_judge(captioner=False)
    for parameter in judge.model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(parameter)))
    return kind(
        model=judge.model, tokenizer=judge.tokenizer, compute=judge.compute, batch=batch, matcher=Head(),
        rerank=rerank,
    )  # fmt: skip


def seen_by(judge: Judge, shard: str, ranks: Ranks = ALONE, *, limit: int | None = None) -> Observed:
    return observe(judge, opened(shard), resolution=32, ranks=ranks, limit=limit)


def run(judge: Judge, shard: str, ranks: Ranks = ALONE, limit: int | None = None) -> Results:
    seen = observe(judge, opened(shard), resolution=32, ranks=ranks, limit=limit)
    return reranked(judge, opened(shard), seen, resolution=32, limit=limit, ranks=ranks)


def logit_of_all(judge: Judge, shard: str, seen: Observed) -> Tensor:
    """(B, N), each pair read alone."""
    source = opened(shard)
    samples = [source.read(i, seed=(0, 0, i), resolution=32) for i in range(23)]
    by_key: dict[str, Any] = {sample.key: sample.image for sample in samples if not sample.fault}
    rows = []
    for key in seen.keys:
        tokens = judge.model.encode_image(by_key[key][None])["image_tokens"]
        one = []
        for ids, length in zip(seen.ids, seen.length, strict=True):
            pair: Any = Pairs(
                image=torch.tensor([0]), tokens=ids[None, : int(length)].long(), text_length=length[None],
                matched=torch.tensor([False]),
            )  # fmt: skip
            one.append(judge.match(tokens, pair))
        rows.append(torch.cat(one))
    return torch.stack(rows)


def by_definition(judge: Judge, seen: Observed, logits: Tensor) -> dict[str, float]:
    """Query by query."""
    assert seen.texts is not None
    alike = seen.features @ seen.texts.T
    says = {(int(o), int(t)) for o, t in zip(seen.owner, seen.text_id, strict=True)}
    right = torch.tensor([[(b, int(t)) in says for t in seen.text_id] for b in range(len(seen.keys))])
    found: dict[str, float] = {}
    told = [float(logits[owner, text] > 0) for text, owner in enumerate(seen.owner.tolist())]
    for way, scores, matched, good in zip(
        WAYS, (alike, alike.T), (logits, logits.T), (right, right.T), strict=True
    ):
        hits = {k: [] for k in KS}
        wrong: dict[int, int] = {}
        for query in range(len(scores)):
            if not good[query].any():
                continue
            order = scores[query].argsort(descending=True).tolist()
            wrong[query] = next(answer for answer in order if not good[query, answer])
            first = sorted(order[: judge.rerank], key=lambda a: -float(scores[query, a] + matched[query, a]))
            order = first + order[judge.rerank :]
            for k in KS:
                hits[k].append(any(good[query, a] for a in order[:k]))
        found |= {f"{way}_recall@{k}_reranked": sum(hits[k]) / len(hits[k]) for k in KS}
        asked = seen.owner.tolist() if way == "image_to_text" else range(len(seen.owner))
        told += [float(matched[query, wrong[query]] <= 0) for query in asked]
    return found | {"itm_accuracy": sum(told) / len(told)}


@pytest.mark.parametrize("first", [1, 4, 16, 100])
def test_values_are_those_of_the_definition(shard, first):
    judge = judge_of(rerank=first)
    seen = seen_by(judge, shard)
    with torch.no_grad():
        expected = by_definition(judge, seen, logit_of_all(judge, shard, seen))
    found = run(judge, shard)
    assert {name: result.value for name, result in found.items()} == pytest.approx(expected)
    assert found["itm_accuracy"].chance == pytest.approx(2 / 3)
    assert found["text_to_image_recall@5_reranked"].chance == 5 / len(seen.keys)


def test_who_knows_finds_first_whatever_is_among_the_nearest(shard):
    judge = judge_of(rerank=10, kind=Oracle)
    seen = seen_by(judge, shard)
    assert seen.texts is not None
    before = recalls(seen.features, seen.texts, owner=seen.owner, text_id=seen.text_id)
    after = run(judge, shard)
    for way in WAYS:
        assert before[f"{way}_recall@1"] < before[f"{way}_recall@10"]
        assert {after[f"{way}_recall@{k}_reranked"].value for k in KS} == {before[f"{way}_recall@10"]}
    assert after["itm_accuracy"].value == 1


def on_ranks(ranks: Ranks, *, shard: str, first: int) -> Results:
    rerank._PAIRS = FEW
    return run(judge_of(rerank=first), shard, ranks)


def test_any_number_of_ranks_finds_the_same_to_the_bit(pool, shard):
    expected = run(judge_of(rerank=5), shard)
    assert len({result.value for result in expected.values()}) > 3
    for world in (1, 2, 4):
        assert pool.run(on_ranks, world, shard=shard, first=5) == [expected] * world


def logits_on_ranks(ranks: Ranks, *, shard: str) -> list[float]:
    rerank._PAIRS = FEW
    judge = judge_of(rerank=5)
    seen = seen_by(judge, shard, ranks)
    right = Right.of(seen.owner, seen.text_id)
    pairs = torch.arange(0, len(seen.keys) * right.different, 3)
    logits = rerank._logits(judge, opened(shard), seen, right, pairs, resolution=32, limit=None, ranks=ranks)
    return logits.tolist()


def test_the_logits_have_the_same_bits(pool, shard):
    expected = logits_on_ranks(ALONE, shard=shard)
    assert len(expected) > 100
    for world in (1, 2, 4):
        for found in pool.run(logits_on_ranks, world, shard=shard):
            assert found == expected


def test_no_more_is_held_than_a_batch_and_a_few_pairs(shard):
    read: list[tuple[int, int]] = []

    class Watched(Judge):
        def match(self, image_tokens: Tensor, pairs: Pairs) -> Tensor:
            read.append((len(image_tokens), len(pairs.image)))
            return Judge.match(self, image_tokens, pairs)

    judge = judge_of(rerank=16, kind=Watched)
    seen = seen_by(judge, shard)
    run(judge, shard)
    assert max(images for images, _ in read) <= 2
    assert max(pairs for _, pairs in read) == FEW
    # No pair twice: what is among the nearest both ways and what is told right from wrong is read once.
    assert sum(pairs for _, pairs in read) <= len(seen.keys) * len(seen.text_id.unique())


def test_where_nearest_answers_are_all_right_there_is_no_wrong_one(tmp_path, write_shard):
    shard = write_shard(tmp_path / "same.tar", 3, beside=lambda place, colour: {"captions": ["a square"]})
    found = run(judge_of(rerank=4, kind=Oracle), shard)
    assert found["itm_accuracy"].value == found["itm_accuracy"].chance == 1
    assert found["image_to_text_recall@1_reranked"].value == 1


def test_only_what_was_looked_at_is_looked_at_again(shard):
    judge = judge_of(rerank=4, kind=Oracle)
    assert len(seen_by(judge, shard, limit=8).keys) == 5
    assert run(judge, shard, limit=8)["itm_accuracy"].value == 1


def test_data_that_change_meanwhile_are_refused(shard, tmp_path, write_shard):
    judge = judge_of(rerank=4)
    seen = replace(seen_by(judge, shard), keys=("other",) * 17)
    with pytest.raises(UserError, match=r"pairs\.tar cannot be read again: it has changed since"):
        reranked(judge, opened(shard), seen, resolution=32, limit=None, ranks=ALONE)


def nearest_on_ranks(ranks: Ranks) -> list[list[list[float]]]:
    generator = torch.Generator().manual_seed(0)
    queries, answers = (torch.randn(size, 8, generator=generator) for size in (40, 30))
    return [each.tolist() for each in nearest(queries, answers, count=5, ranks=ranks)]


def test_the_nearest_are_known_on_every_rank(pool):
    expected = nearest_on_ranks(ALONE)
    assert torch.tensor(expected).shape == (2, 40, 5)
    for world in (2, 4):
        assert pool.run(nearest_on_ranks, world) == [expected] * world
