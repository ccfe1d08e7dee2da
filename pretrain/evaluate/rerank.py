"""Retrieval, looked at twice: what is nearest by embeddings is put into the order of a matcher.

B images, N texts, M pairs of an image and a text, Q queries, n answers of each, U different captions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.errors import UserError
from datasets.loader import evaluation_batches
from datasets.order import share
from datasets.source import Source
from objectives.base import Pairs
from pretrain.distributed import Ranks
from pretrain.evaluate.judge import Judge
from pretrain.evaluate.observe import THREADS, Observed, Share, together
from pretrain.evaluate.results import Result, Results
from pretrain.evaluate.retrieval import KS, Right, nearest

_PAIRS = 256
"""Pairs that are read at a time."""


def reranked(
    judge: Judge, source: Source, seen: Observed, *, resolution: int, limit: int | None, ranks: Ranks
) -> Results:
    """Recall at 1, 5 and 10 after the matcher has ordered the first answers, and how well it tells pairs.

    The `judge.rerank` nearest answers of a query are ordered by the sum of their similarity and the log of
    the odds that they match (BLIP, arXiv 2201.12086; LAVIS, `compute_sim_matrix`, whose two-way head gives
    one of two logits where ours gives their difference). Answers behind them keep their places.

    `itm_accuracy` is over every text with its image, and over both with the wrong answer that is nearest,
    unless the nearest answers are all right.

    The text tower runs for (B + N) * `judge.rerank` pairs at most, beside those for the accuracy; every
    image is read and encoded a second time, so that no more image tokens than a batch's are ever kept. What
    a batch computes is the same on any number of ranks, and so are the values, to the bit.

    Args:
        judge: a model with a matcher.
        source: what `seen` was seen of.
        seen: the embeddings.
        resolution: side of the images in pixels.
        limit: as of `seen`.
        ranks: share the work; each gets the results.

    Raises:
        UserError: the data cannot be read again, or have changed; on every rank alike.
        StoppedError: a rank was asked to stop; on every rank alike.
    """
    assert seen.texts is not None
    right = Right.of(seen.owner, seen.text_id)
    to_text, to_image = _nearest(judge, seen, ranks)
    # Of each text: the two as they belong, its image beside a wrong text, and a wrong image beside it.
    true = _Answers("", seen.owner, torch.arange(len(seen.texts)), torch.empty(0))
    other_text = to_text.first_wrong(right, torch.searchsorted(seen.owner.unique(), seen.owner))
    other_image = to_image.first_wrong(right, true.text)
    lists = [each.first(judge.rerank) for each in (to_text, to_image)]
    pairs = torch.cat([each.numbers(right).flatten() for each in (*lists, true, other_text, other_image)])
    pairs = pairs.unique()
    logits = _logits(judge, source, seen, right, pairs, resolution=resolution, limit=limit, ranks=ranks)

    def logit(answers: _Answers) -> Tensor:
        return logits[torch.searchsorted(pairs, answers.numbers(right))]

    results: Results = {}
    for every, first in zip((to_text, to_image), lists, strict=True):
        good = every.in_order_of(first.alike + logit(first), right)
        for k in KS:
            hits = good[:, :k].any(1).double().mean().item()
            chance = min(1.0, k / len(seen.keys))
            results[f"{every.name}_recall@{k}_reranked"] = Result(value=hits, chance=chance)
    told = torch.cat([logit(true) > 0, logit(other_text) <= 0, logit(other_image) <= 0])
    share_of_true = len(true.image) / len(told)
    results["itm_accuracy"] = Result(
        value=told.double().mean().item(), chance=max(share_of_true, 1 - share_of_true)
    )
    return results


@dataclass(frozen=True, slots=True)
class _Answers:
    """Pairs of a query and an answer, (Q, n) or flat."""

    name: str
    image: Tensor
    text: Tensor
    alike: Tensor
    """Their similarities."""

    def numbers(self, right: Right) -> Tensor:
        """One of each different (image, caption), sorted by image."""
        return self.image * right.different + right.caption[self.text]

    def first(self, count: int) -> _Answers:
        """The nearest answers of each query."""
        return _Answers(self.name, self.image[:, :count], self.text[:, :count], self.alike[:, :count])

    def first_wrong(self, right: Right, queries: Tensor) -> _Answers:
        """Of each of these queries the nearest answer that is wrong, without those that have none."""
        wrong = ~right(self.image, self.text)
        queries = queries[wrong.any(1)[queries]]
        place = queries, wrong.int().argmax(1)[queries]
        return _Answers(self.name, self.image[place], self.text[place], self.alike[place])

    def in_order_of(self, scores: Tensor, right: Right) -> Tensor:
        """(Q, n) whether each answer is right, the first ones ordered by their (Q, m) scores."""
        good = right(self.image, self.text)
        order = scores.argsort(dim=1, descending=True, stable=True)
        return torch.cat([good.gather(1, order), good[:, order.shape[1] :]], 1)


def _nearest(judge: Judge, seen: Observed, ranks: Ranks) -> tuple[_Answers, _Answers]:
    """The nearest texts of each image that has one, and the nearest images of each text."""
    assert seen.texts is not None
    count, asking = max(*KS, judge.rerank), seen.owner.unique()
    alike, text = nearest(seen.features[asking], seen.texts, count=count, ranks=ranks)
    to_text = _Answers("image_to_text", asking[:, None].expand_as(text), text, alike)
    alike, image = nearest(seen.texts, seen.features, count=count, ranks=ranks)
    every = torch.arange(len(seen.texts))[:, None]
    return to_text, _Answers("text_to_image", image, every.expand_as(image), alike)


def _logits(
    judge: Judge,
    source: Source,
    seen: Observed,
    right: Right,
    pairs: Tensor,
    *,
    resolution: int,
    limit: int | None,
    ranks: Ranks,
) -> Tensor:
    """(M,) log of the odds that each pair matches, of (M,) sorted numbers, on every rank."""
    batches = evaluation_batches(
        source,
        judge.tokenizer,
        batch=judge.batch,
        resolution=resolution,
        limit=limit,
        rank=ranks.rank,
        ranks=ranks.world,
        threads=THREADS,
    )
    starts = [0, *torch.tensor(seen.batches).cumsum(0).tolist()]
    mine = Share[Tensor]()
    try:
        for place, examined in zip(share(len(seen.batches), ranks.rank, ranks.world), batches, strict=True):
            if judge.asked():
                mine.stopped = True
                break
            start, stop = starts[place], starts[place + 1]
            kept = examined.batch.image_valid
            if [examined.samples[at].key for at in kept.nonzero().flatten()] != [*seen.keys[start:stop]]:
                raise UserError("it has changed since it was read first")
            first, last = torch.searchsorted(pairs, torch.tensor([start, stop]) * right.different).tolist()
            image_tokens = judge.image_tokens(examined.batch)[kept.to(judge.compute.device)]
            for some in pairs[first:last].split(_PAIRS):
                if judge.asked():
                    mine.stopped = True
                    break
                mine.parts.append(_of_some(judge, seen, right, some, image_tokens, start=start))
    except (OSError, UserError) as error:  # for every rank to know, or the others would wait for this one
        mine.fault = f"{source.name} cannot be read again: {error}"
    return torch.cat(together(mine, ranks))


def _of_some(
    judge: Judge, seen: Observed, right: Right, pairs: Tensor, image_tokens: Tensor, *, start: int
) -> Tensor:
    """(M,) log odds of pairs with images of one batch, of which the first has the number `start`."""
    if not len(pairs):
        return torch.empty(0)
    image, caption = pairs // right.different, pairs % right.different
    text = _one_of_each(right)[caption]
    length = seen.length[text]
    tokens = seen.ids[text, : int(length.max())].long()
    # They are sorted by image: only those from the first to the last are read.
    low, high = int(image[0]), int(image[-1])
    device = judge.compute.device
    asked = Pairs(
        image=(image - low).to(device),
        tokens=tokens.to(device),
        text_length=length.to(device),
        matched=right(image, text).to(device),
    )
    return judge.match(image_tokens[low - start : high + 1 - start], asked)


def _one_of_each(right: Right) -> Tensor:
    """(U,) the first text that says each caption."""
    texts = torch.arange(len(right.caption))
    return texts.new_full((right.different,), len(texts)).scatter_reduce(0, right.caption, texts, "amin")
