"""Image-text matching: does this text belong to this image, asked of a tower that reads both together.

Every pair is asked about three times: as it is, with a hard negative text, and with a hard negative image. A
text travels to the image that it is read with. The other way round the tokens of an image would have to,
a thousand times the bytes of a text's ids, and their gradients back; ids have none. What is computed, and so
its gradient, is the same. The price: an image that many texts take for theirs is read with all of them on
its own rank and in its own micro-batch.

M pairs that are read, n valid pairs here, N texts here, G texts and B images of all ranks, T tokens,
Dt width, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.batch import Batch
from datasets.source import Field
from objectives.base import FUSED, IMAGE, IMAGE_TOKENS, TEXT, Encodings, Objective, Pairs, Terms, Widths
from objectives.candidates import Toward, candidates
from objectives.contrast import Known, meet
from objectives.gather import exchange
from objectives.negatives import draw, text_names


class ITM(Objective):
    """Binary cross-entropy over each pair and its two hard negatives, a third of their sum per pair.

    ALBEF (arXiv 2107.07651, section 3.2) and BLIP (arXiv 2201.12086; models/blip_pretrain.py). As there, a
    negative is drawn with the softmax of the scaled similarity; unlike there, out of the whole global batch,
    with every known positive left out (another text of the image, an equal caption), and by noise that
    depends on the samples and not on their ranks. A pair all of whose candidates are positives has no such
    negative: that term is left out, and counted.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """Settings of itm."""

    needs: ClassVar[frozenset[Field]] = frozenset({"image", "text"})
    draws: ClassVar[bool] = True

    def __init__(self, config: ITM.Config, widths: Widths) -> None:
        super().__init__()
        self.compares = widths.contrast
        self.coupled = (IMAGE, TEXT) if self.compares else ()
        self.passes = (IMAGE_TOKENS, FUSED, *self.coupled)
        if not self.compares:
            self.remark = (
                "negatives are drawn evenly, because no objective of this run compares images and texts: "
                "beside itc or siglip they would be hard ones"
            )
        self.head = _Logit(widths.text_tokens, 1)

    def denominator(self, batch: Batch) -> Tensor:
        """Pairs."""
        return batch.pair_valid.sum()

    def forward(self, encodings: Encodings, batch: Batch, pairs: Pairs | None = None) -> Terms:
        """Sum over the pairs that are read with our images."""
        assert pairs is not None, "itm is given what it has drawn"
        logit = self.match_logit(encodings.fused(pairs))
        matched = pairs.matched
        loss = F.binary_cross_entropy_with_logits(logit, matched.to(logit.dtype), reduction="sum")
        with torch.no_grad():
            hits = ((logit > 0) == matched).sum().double() / 3
            trivial = (~matched).sum().double() / 3
            # A pair of ours may be read elsewhere, and others' here: only the sum over all is a count.
            missing = (3 * self.denominator(batch) - len(matched)).double() / 3
        return Terms(loss / 3, {"accuracy": hits, "trivial": trivial, "missing": missing})

    def match_logit(self, states: Tensor) -> Tensor:
        """(M,) log odds that text and image belong together, of (M, Dt) states; float32 or better."""
        return self.head(states).squeeze(1)

    def draw(self, encodings: Encodings, batch: Batch) -> Pairs:
        """Each of our images with the texts that it is read with, whichever rank has drawn them."""
        known, names = meet(encodings, batch), text_names(batch)
        image_names = known.images.collect(batch.sample_id[: len(batch.images)])
        image = self._drawn(encodings, batch, "image", rows=names, columns=image_names)
        text = self._drawn(encodings, batch, "text", rows=names, columns=known.texts.collect(names))
        table = torch.stack([image, text, batch.text_length, names], dim=1)
        return _bring(known, known.texts.collect(table), batch)

    def _drawn(
        self, encodings: Encodings, batch: Batch, toward: Toward, *, rows: Tensor, columns: Tensor
    ) -> Tensor:
        """(N,) the place of each of our texts' negative among all images or texts; -1 where it has none."""
        scale = encodings.logit_scale.exp() if self.compares else None
        places = torch.full_like(rows, -1)
        for strip in candidates(encodings, batch, toward, scale):
            key = (*encodings.key, toward)
            at = draw(strip.logits, rows[strip.pairs], columns[strip.columns], key=key)
            found = at >= 0
            places[strip.pairs[found]] = strip.columns[at[found]]
        return places


class _Logit(nn.Linear):
    """A linear layer in float32 or better, whatever autocast and the dtype of its parameters are."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as torch names it)
        """(M, Dt) -> (M, 1)."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(wide), self.weight.to(wide), self.bias.to(wide))


def _bring(known: Known, table: Tensor, batch: Batch) -> Pairs:
    """Fetch the texts that our images are read with.

    Every rank knows every choice, so each can say what it sends and what comes: the ids of a text once to
    each rank that reads it, without padding.

    Args:
        known: of all ranks.
        table: (G, 4) of each text its negative image, its image's negative text, its length and its name.
        batch: ours.
    """
    negative_image, negative_text, length, names = table.unbind(1)
    own = (known.text_image >= 0).nonzero().squeeze(1)
    image = torch.cat([known.text_image[own], negative_image[own], known.text_image[own]])
    text = torch.cat([own, own, negative_text[own]])
    matched = torch.arange(len(image), device=image.device) < len(own)
    there = (image >= 0) & (text >= 0)
    image, text, matched = image[there], text[there], matched[there]

    reader, place = known.images.owner(image)
    holder, _ = known.texts.owner(text)
    rank, world = known.images.rank, len(known.images.counts)
    sent = _distinct((reader * len(table) + text)[holder == rank])
    reader_of_sent, sent = sent // len(table), sent % len(table)
    come = _distinct(text[reader == rank])
    ids = exchange(
        _packed(batch.tokens[sent - known.texts.offset], length[sent]),
        send=_totals(reader_of_sent, length[sent], world),
        receive=_totals(known.texts.owner(come)[0], length[come], world),
        group=known.texts.group,
    )

    here = (reader == rank).nonzero().squeeze(1)
    for key in (names[text], (~matched).long(), image):  # by image, its own texts first
        here = here[key[here].argsort(stable=True)]
    row = torch.searchsorted(come, text[here])
    return Pairs(
        image=place[here],
        tokens=_unpacked(ids, length[come])[row],
        text_length=length[come][row],
        matched=matched[here],
    )


def _distinct(numbers: Tensor) -> Tensor:
    """Each number once, in order."""
    ordered = numbers.sort().values
    return ordered[ordered != F.pad(ordered[:-1], (1, 0), value=-1)]


def _totals(ranks: Tensor, lengths: Tensor, world: int) -> list[int]:
    """How many ids go to, or come from, each rank."""
    totals = torch.zeros(world, dtype=torch.int64, device=ranks.device).index_add_(0, ranks, lengths)
    return [int(total) for total in totals.cpu()]


def _packed(tokens: Tensor, lengths: Tensor) -> Tensor:
    """(n, T) ids and (n,) lengths to all of them in one int32 row, without padding."""
    return tokens[_inside(tokens.shape[1], lengths)].int()


def _unpacked(ids: Tensor, lengths: Tensor) -> Tensor:
    """One row of ids to (n, T) int64, T the longest, 0 behind each."""
    longest = int(lengths.max()) if len(lengths) else 2
    tokens = torch.zeros(len(lengths), longest, dtype=torch.int64, device=ids.device)
    tokens[_inside(longest, lengths)] = ids.long()
    return tokens


def _inside(longest: int, lengths: Tensor) -> Tensor:
    """(n, T) bool: whether a place is within its text."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]
