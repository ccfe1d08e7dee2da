"""Samples to one ragged Batch.

B images, N texts, T tokens of the longest text in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from datasets.batch import Batch
from datasets.sample import Sample
from datasets.tokens import Tokenizer, normalise


def collate(samples: Sequence[Sample], tokenizer: Tokenizer, *, resolution: int) -> Batch:
    """Stack the images and tokenise every caption that the samples hold.

    A sample without image adds no image, one without captions no text. A masked sample adds a black image
    and an empty text, both marked invalid, so that its slot stays. Nothing is padded beyond the longest
    text here; a batch without texts has N = 0.
    """
    black = torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8)
    images: list[Tensor] = []
    valid: list[bool] = []
    keys: list[str] = []
    texts: list[tuple[str, int, bool]] = []  # caption, its image or -1, whether it is to be read
    for sample in samples:
        masked = sample.fault is not None
        image = black[0] if masked else sample.image
        place = -1
        if image is not None:
            assert image.shape == (3, resolution, resolution), (sample.key, image.shape)
            place = len(images)
            images.append(image)
            valid.append(not masked)
            keys.append(sample.key)
        texts += [(caption, place, not masked) for caption in ([""] if masked else sample.captions)]
    tokens, length = _tokens([caption for caption, _, _ in texts], tokenizer)
    return Batch(
        images=torch.stack(images) if images else black[:0],
        image_valid=torch.tensor(valid, dtype=torch.bool),
        tokens=tokens,
        text_length=length,
        image_index=torch.tensor([place for _, place, _ in texts], dtype=torch.int64),
        text_valid=torch.tensor([readable for _, _, readable in texts], dtype=torch.bool),
        text_id=torch.tensor([text_id(caption) for caption, _, _ in texts], dtype=torch.int64),
        keys=tuple(keys),
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
