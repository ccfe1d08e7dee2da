"""What a step would read: how much data there is, how long captions are, and batches of those sizes.

B images, N texts, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from datasets.batch import Batch
from datasets.holding import GIVES, NEEDS, Holds
from datasets.loader import Feed
from datasets.shards.tars import Tars
from datasets.tokens import Tokenizer
from objectives import kind_of, objective_class
from pretrain.config import Run
from pretrain.plan.paper import Paper

_MEASURED = 512
"""Captions of a source that are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One source, as far as a plan knows it."""

    name: str
    holds: Holds
    lengths: tuple[int, ...]
    """Tokens of captions, start and end counted, over and over."""
    told: str
    """Where the lengths are from."""
    samples: float | None
    """In one pass; None without end."""
    shards: int = 0
    bytes: int = 0
    """Of all shards; 0 where that is not known."""


def without_data(run: Run, *, pairs: float, length: int, told: str) -> list[Input]:
    """Sources of a stated size: each has as many of the pairs as the others."""
    return [
        Input(name=name, holds=each.holds, lengths=(length,), told=told, samples=pairs / len(run.sources))
        for name, each in run.sources.items()
    ]


def of_data(feeds: Sequence[Feed], tokenizer: Tokenizer, *, length: int) -> list[Input]:
    """What the data say; the lengths of some captions spread over them, or the stated one."""
    found: list[Input] = []
    for feed in feeds:
        lengths, told = ([length], "as stated") if length else _measured(feed, tokenizer)
        shards = feed.source.manifest if isinstance(feed.source, Tars) else None
        found.append(
            Input(
                name=feed.name,
                holds=feed.holding.holds,
                lengths=tuple(lengths),
                told=told,
                samples=feed.source.size,
                shards=len(shards) if shards else 0,
                bytes=shards.total_bytes if shards else 0,
            )
        )
    return found


def _measured(feed: Feed, tokenizer: Tokenizer) -> tuple[list[int], str]:
    size = feed.source.size or _MEASURED
    many = min(size, _MEASURED)
    texts = [text for at in range(many) for text in feed.source.captions(at * size // many)[:1]]
    if not texts:
        return [tokenizer.context_length], "as long as the model reads"
    lengths = [len(tokenizer.encode(text)) for text in texts]
    return lengths, f"as {len(texts)} captions of the data are"


def feeding(run: Run, stage: str) -> dict[str, tuple[str, ...]]:
    """Of each source of a stage, the objectives that see it: those it names, or all that it can feed."""
    fed: dict[str, tuple[str, ...]] = {}
    there = run.stages[stage]
    for name, source in run.sources.items():
        if there.sources and name not in there.sources:
            continue
        can = [
            each for each, config in run.objectives.items()
            if objective_class(kind_of(config)).needs <= GIVES[source.holds]
        ]  # fmt: skip
        named = source.objectives or can
        fed[name] = tuple(each for each in named if not there.objectives or each in there.objectives)
    return fed


def micro_batches(
    paper: Paper, inputs: Sequence[Input], samples: Mapping[str, int], *, pieces: int, resolution: int
) -> list[Batch]:
    """A rank's micro-batches: `pieces` of so many samples for each source."""
    batches: list[Batch] = []
    for each in inputs:
        for piece in range(pieces):
            many = samples.get(each.name, 0)  # a stage need not read all
            first = piece * many
            if many:
                batches.append(_batch(paper, each, first, many, resolution))
    return batches


def _batch(paper: Paper, source: Input, first: int, many: int, resolution: int) -> Batch:
    needs = NEEDS[source.holds]
    images = many if "image" in needs else 0
    texts = many if "text" in GIVES[source.holds] else 0
    lengths = torch.tensor([source.lengths[at % len(source.lengths)] for at in range(first, first + texts)])
    longest = int(lengths.max()) if texts else 2
    places = torch.arange(texts)
    return Batch(
        images=paper.size(images, 3, resolution, resolution, dtype=torch.uint8),
        image_valid=torch.ones(images, dtype=torch.bool),
        tokens=torch.where(torch.arange(longest) < lengths[:, None], 3, 0).view(texts, longest),
        text_length=lengths.long(),
        image_index=places if images else torch.full((texts,), -1),
        text_valid=torch.ones(texts, dtype=torch.bool),
        text_id=places + first,
        boxes=torch.zeros(texts, 4),
        box_valid=torch.full((texts,), source.holds == "phrases"),
        keys=tuple(f"{first + at}" for at in range(many)),
        sample_id=torch.arange(first, first + many),
        source=source.name,
    )
