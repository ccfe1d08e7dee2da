"""What a model makes of a whole data set, in one run of its encoders that the ranks share.

B images, N texts, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from datasets.errors import UserError
from datasets.loader import Examined, evaluation_batches
from datasets.source import Source
from pretrain.distributed import Ranks, SaidByRankZeroError
from pretrain.evaluate.judge import Judge, Look

THREADS = 2
"""That read and decode."""

Part = TypeVar("Part")


class StoppedError(Exception):
    """A rank was asked to stop before all of it was judged; raised on every rank alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """A data set as a model sees it; the same on every rank, and bit by bit on any number of them.

    Samples that cannot be read are left out.
    """

    keys: tuple[str, ...]
    """B names."""
    features: Tensor
    """(B, D) of the images; see `Look`."""
    labels: tuple[str | int | None, ...]
    """B classes, where they are known."""
    references: tuple[tuple[str, ...], ...]
    """Of each image its captions."""
    texts: Tensor | None
    """(N, D) embeddings of all captions."""
    owner: Tensor
    """(N,) the image of each."""
    text_id: Tensor
    """(N,) equal for equal captions."""
    ids: Tensor
    """(N, T) int32 their ids, as many columns as the longest has."""
    length: Tensor
    """(N,) how many of them each has."""
    batches: tuple[int, ...]
    """Of each batch that was encoded, in order, how many of the B images were in it."""
    said: tuple[str, ...] | None
    """Of each image a generated caption."""
    loss: float
    """Negative log likelihood of all captions together, over `tokens`."""
    tokens: int
    masked: int
    """Samples that were left out."""


def observe(
    judge: Judge,
    source: Source,
    *,
    resolution: int,
    ranks: Ranks,
    limit: int | None = None,
    write: bool = True,
) -> Observed:
    """Run a model over a data set.

    Args:
        judge: the model.
        source: the data, of a known size or cut by `limit`.
        resolution: side of the images in pixels.
        ranks: those that share the work; each gets all of the result.
        limit: samples to look at, the first ones.
        write: whether to generate captions, where the model can.

    Raises:
        UserError: not one sample can be read, or the data themselves cannot; on every rank alike.
        StoppedError: a rank was asked to stop; the others have ended their share.
    """
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
    mine = Share[Observed]()
    try:
        for examined in batches:
            if judge.asked():
                mine.stopped = True
                break
            mine.parts.append(_part(examined, judge.look(examined.batch, write=write)))
    except (OSError, UserError) as error:  # for every rank to know, or the others would wait for this one
        mine.fault = f"{source.name} cannot be read: {error}"
    parts = together(mine, ranks)
    if not any(part.keys for part in parts):
        refuse(f"not one sample of {source.name} can be read", ranks)
    return _join(parts)


@dataclass
class Share(Generic[Part]):
    """What one rank has made of its batches."""

    parts: list[Part] = field(default_factory=lambda: [])
    fault: str = ""
    """Why it has not made all of it."""
    stopped: bool = False
    """Whether it was asked to stop first."""


def together(mine: Share[Part], ranks: Ranks) -> list[Part]:
    """What all ranks have made, in the order of the batches, on every rank.

    Raises:
        UserError: one of them has met a fault; on every rank alike.
        StoppedError: one of them was asked to stop; on every rank alike.
    """
    everyone = [mine]
    if ranks.group is not None:
        everyone = [mine] * ranks.world
        dist.all_gather_object(everyone, mine, group=ranks.group)
    fault = next((each.fault for each in everyone if each.fault), "")
    if fault:
        refuse(fault, ranks)
    if any(each.stopped for each in everyone):
        raise StoppedError
    return [part for each in everyone for part in each.parts]


def refuse(fault: str, ranks: Ranks) -> NoReturn:
    """Raise on every rank what one of them says aloud."""
    raise UserError(fault) if ranks.zero else SaidByRankZeroError(fault)


def _part(examined: Examined, look: Look) -> Observed:
    """One batch, without what could not be read."""
    batch, kept = examined.batch, examined.batch.image_valid
    place = torch.where(kept, kept.cumsum(0) - 1, -1)
    pairs = batch.pair_valid
    good = [at for at, valid in enumerate(kept.tolist()) if valid]
    samples = [examined.samples[at] for at in good]
    return Observed(
        keys=tuple(sample.key for sample in samples),
        features=look.features[kept],
        labels=tuple(sample.label for sample in samples),
        references=tuple(sample.captions for sample in samples),
        texts=None if look.texts is None else look.texts[pairs],
        owner=place[batch.image_index[pairs]],
        text_id=batch.text_id[pairs],
        ids=batch.tokens[pairs].int(),
        length=batch.text_length[pairs],
        batches=(len(good),),
        said=None if look.said is None else tuple(look.said[at] for at in good),
        loss=look.loss,
        tokens=look.tokens,
        masked=len(examined.samples) - len(good),
    )


def _join(parts: list[Observed]) -> Observed:
    starts = torch.tensor([0, *(len(part.keys) for part in parts)]).cumsum(0).tolist()
    texts = [part.texts for part in parts if part.texts is not None]
    said = [part.said for part in parts if part.said is not None]
    longest = max(part.ids.shape[1] for part in parts)
    return Observed(
        keys=tuple(key for part in parts for key in part.keys),
        features=torch.cat([part.features for part in parts]),
        labels=tuple(label for part in parts for label in part.labels),
        references=tuple(each for part in parts for each in part.references),
        texts=torch.cat(texts) if texts else None,
        owner=torch.cat([part.owner + start for part, start in zip(parts, starts, strict=False)]),
        text_id=torch.cat([part.text_id for part in parts]),
        ids=torch.cat([pad(part.ids, (0, longest - part.ids.shape[1])) for part in parts]),
        length=torch.cat([part.length for part in parts]),
        batches=tuple(size for part in parts for size in part.batches),
        said=tuple(each for one in said for each in one) if said else None,
        loss=sum(part.loss for part in parts),
        tokens=sum(part.tokens for part in parts),
        masked=sum(part.masked for part in parts),
    )
