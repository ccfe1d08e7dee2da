"""Samples to one ragged Batch.

B images, N texts, T tokens of the longest text in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from datasets.batch import Batch, sample_id
from datasets.sample import Sample
from datasets.tokens import Tokenizer, normalise
from datasets.views import Box


def collate(
    samples: Sequence[Sample], tokenizer: Tokenizer, *, resolution: int, images: bool = True, source: str = ""
) -> Batch:
    """Stack the images and tokenise every caption that the samples hold.

    A sample without captions adds no text. A masked sample adds a black image and an empty text, both marked
    invalid, so that its slot stays. Nothing is padded beyond the longest text here; a batch without texts
    has N = 0.

    Args:
        samples: with an image each, or all without.
        tokenizer: the run's.
        resolution: side of the images in pixels.
        images: False where samples are text alone: B = 0.
        source: what the batch says it is of.
    """
    black = torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8)
    pixels: list[Tensor] = []
    texts: list[tuple[str, int, bool, Box | None]] = []  # caption, its image or -1, whether it is to be read
    for place, sample in enumerate(samples):
        masked = sample.fault is not None
        if images:
            image = black[0] if masked else sample.image
            assert image is not None, sample.key
            assert image.shape == (3, resolution, resolution), (sample.key, image.shape)
            pixels.append(image)
        boxes = sample.boxes or [None] * len(sample.captions)
        for caption, box in [("", None)] if masked else zip(sample.captions, boxes, strict=True):
            texts.append((caption, place if images else -1, not masked, box))
    tokens, length = _tokens([caption for caption, *_ in texts], tokenizer)
    return Batch(
        images=torch.stack(pixels) if pixels else black[:0],
        image_valid=torch.tensor(
            [sample.fault is None for sample in samples[: len(pixels)]], dtype=torch.bool
        ),
        tokens=tokens,
        text_length=length,
        image_index=torch.tensor([place for _, place, _, _ in texts], dtype=torch.int64),
        text_valid=torch.tensor([readable for _, _, readable, _ in texts], dtype=torch.bool),
        text_id=torch.tensor([text_id(caption) for caption, *_ in texts], dtype=torch.int64),
        boxes=torch.tensor([box or (0.0, 0.0, 0.0, 0.0) for *_, box in texts]).reshape(-1, 4),
        box_valid=torch.tensor([box is not None for *_, box in texts], dtype=torch.bool),
        keys=tuple(sample.key for sample in samples),
        sample_id=torch.tensor([sample_id(source, sample.key) for sample in samples], dtype=torch.int64),
        source=source,
    )


def text_id(caption: str) -> int:
    """63 bits of a hash of the normalised caption, the same in every process: equal captions are equal."""
    digest = blake2b(normalise(caption).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _tokens(captions: Sequence[str], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """(N, T) ids padded with 0, and (N,) lengths; T is at least the 2 of an empty text."""
    encoded = [tokenizer.encode(caption) for caption in captions]
    longest = max(map(len, encoded), default=2)
    tokens = torch.zeros(len(encoded), longest, dtype=torch.int64)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens, torch.tensor([len(ids) for ids in encoded], dtype=torch.int64)
