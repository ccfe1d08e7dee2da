"""What may be drawn as a negative: everything of all ranks that is no known positive.

An image and a text are a known positive where the text, or an equal one, is among the image's texts. Masked
slots are no candidates.

n valid pairs here, s of them at once, C candidates, N texts and b images here, G texts and B images of all
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from datasets.batch import Batch
from objectives.base import IMAGE, TEXT, Encodings
from objectives.contrast import Known, meet, similarity

Toward = Literal["image", "text"]
"""Whether a pair's text looks for images, or its image for texts."""

_ROWS = 256


@dataclass(frozen=True, slots=True)
class Strip:
    """Some of our pairs against the candidates of all ranks."""

    pairs: Tensor
    """(s,) places of the pairs' texts among our texts."""
    columns: Tensor
    """(C,) places of the candidates among the images, or the texts, of all ranks."""
    logits: Tensor
    """(s, C) scaled similarities; -inf at known positives."""


@torch.no_grad()
def candidates(encodings: Encodings, batch: Batch, toward: Toward, scale: Tensor | None) -> Iterator[Strip]:
    """Our valid pairs against everything that is no known positive of theirs, without gradient.

    All collectives happen here and now, on every rank, also one without pairs.

    Args:
        encodings: of the micro-batch.
        batch: the micro-batch.
        toward: `image` for our texts against all images, `text` for our pairs' images against all texts.
        scale: (1,) of the similarity; None where nothing is compared: no encoding is read, logits are 0.

    Returns:
        An iterator over strips of pairs, in order; it waits for no other rank.
    """
    known = meet(encodings, batch)
    if toward == "image":
        columns, places, index = known.image_valid.nonzero().squeeze(1), known.images, known.own
    else:
        columns, places = (known.text_image >= 0).nonzero().squeeze(1), known.texts
        index = batch.image_index[known.own]
    if scale is None:
        return _strips(known, toward, columns, None)
    mine = encodings[TEXT if toward == "image" else IMAGE].detach()[index]
    everyone = places.collect(encodings[IMAGE if toward == "image" else TEXT].detach())
    return _strips(known, toward, columns, (scale.detach() * mine, everyone[columns]))


def _strips(
    known: Known, toward: Toward, columns: Tensor, compared: tuple[Tensor, Tensor] | None
) -> Iterator[Strip]:
    texts = (known.text_image >= 0).nonzero().squeeze(1)
    image, word = known.text_image[texts], known.text_word[texts]
    words = int(word.max()) + 1 if len(word) else 0
    for rows in torch.split(torch.arange(len(known.own), device=columns.device), _ROWS):
        place = known.own[rows] + known.texts.offset
        # Which images have this pair's caption, or which captions this pair's image has.
        same, other, kinds = known.text_word[place, None] == word, image, len(known.image_valid)
        if toward == "text":
            same, other, kinds = known.text_image[place, None] == image, word, words
        kin = torch.zeros(len(rows), kinds, dtype=torch.int32, device=columns.device)
        kin = kin.index_add_(1, other, same.int())[:, columns if toward == "image" else word] > 0
        logits = torch.zeros(kin.shape, device=columns.device)
        if compared is not None:
            logits = similarity(compared[0][rows], compared[1])
        yield Strip(known.own[rows], columns, logits.masked_fill_(kin, -torch.inf))
