"""An export is proven before it stands: the library that will read it must say what the run's model says.

B images, N captions, D embedding width, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL.Image import Image, fromarray
from torch import Tensor

from datasets.errors import UserError
from pretrain.evaluate.subject import Subject

TOLERANCE = 1e-5
"""The most that a component of an embedding of unit norm, or a probability, may differ by."""
_PAIRS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A written export, as its library has read it back."""

    library: str
    """Name and version."""
    images: Callable[[list[Image]], Tensor]
    """(B, D) of B images, through the library's own preprocessing."""
    texts: Callable[[list[str]], Tensor]
    """(N, D) of N captions, through the library's own tokenizer."""
    logits: Callable[[list[Image], list[str]], Tensor] | None = None
    """(N, T-1, V) of N images with a caption each, where there is a decoder."""
    logit_scale: Tensor
    logit_bias: Tensor | None


@torch.no_grad()
def prove(subject: Subject, written: Written) -> None:
    """Compare what both say of random images and random captions.

    Raises:
        UserError: they differ by more than `TOLERANCE`.
    """
    model, side = subject.model, subject.resolution
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (_PAIRS, 3, side, side), dtype=torch.uint8, generator=generator)
    pictures = [fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    captions = _random_captions(subject)
    ids = [torch.tensor(subject.tokenizer.encode(caption)) for caption in captions]
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    length = torch.tensor([len(each) for each in ids])
    seen, read = model.encode_image(pixels), model.encode_text(tokens, length)
    compared = {
        "image embeddings": written.images(pictures) - seen["image"],
        "text embeddings": written.texts(captions) - read["text"],
        "logit_scale": written.logit_scale.reshape(1) - model.logit_scale,
    }
    if written.logit_bias is not None and model.logit_bias is not None:
        compared["logit_bias"] = written.logit_bias.reshape(1) - model.logit_bias
    if written.logits is not None:
        assert model.captioner is not None
        states = model.captioner(seen["image_tokens"], read["text_tokens"][:, :-1])
        ours, real = (
            model.captioner.head.logits(states),
            torch.arange(tokens.shape[1] - 1) < length[:, None] - 1,
        )
        theirs = written.logits(pictures, captions)[:, : ours.shape[1]]
        compared["probabilities of words"] = (theirs.softmax(-1) - ours.softmax(-1))[real]
    for what, difference in compared.items():
        most = difference.abs().max().item()
        if not most <= TOLERANCE:  # not a number is no proof either
            raise UserError(
                f"{written.library} reads {what} from this export that differ from the run's by {most:.1e}, "
                f"more than {TOLERANCE}, so it was not kept: please report it with run.yaml"
            )


def _random_captions(subject: Subject) -> list[str]:
    """Captions of the tokenizer's own words, from one word to more than the model can read."""
    tokenizer, chance = subject.tokenizer, random.Random(0)
    words = ["A", "dog's", "photo"]
    while len(words) < tokenizer.context_length + 1:
        # Some ids are parts of a letter, or spelt in a way that is cleaned away.
        word = tokenizer.decode([chance.randrange(tokenizer.vocabulary)]).strip()
        words.append(word if word.isascii() and word.isalnum() else "two")
    longest = len(words)
    lengths = [1, 2, *(chance.randint(3, longest) for _ in range(_PAIRS - 3)), longest]
    return [" ".join(chance.sample(words, length)) for length in lengths]
