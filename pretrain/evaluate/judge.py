"""A model as evaluation sees it: no gradient, training's own arithmetic, one batch at a time.

B images, N texts, D embedding width, W width of the image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from datasets.batch import Batch
from datasets.tokens import Tokenizer
from objectives.base import IMAGE, IMAGE_TOKENS, TEXT, Objective, Pairs, Widths
from objectives.lm import LM
from pretrain.encodings import ModelEncodings
from pretrain.precision import Compute
from pretrain.zoo.dual import Dual
from pretrain.zoo.generate import greedy

_SENTENCES = 256
"""Sentences that are encoded at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a model makes of a batch, in host memory."""

    features: Tensor
    """(B, D) unit norm; (B, W) mean image tokens of a model that was never trained to embed images."""
    texts: Tensor | None
    """(N, D) unit norm, where the model has a text tower."""
    said: tuple[str, ...] | None
    """A greedy caption of each image, where the model has a captioner."""
    loss: float
    """Sum over the caption tokens of the negative log likelihood, where the model has a captioner."""
    tokens: int
    """Their number."""


@runtime_checkable
class Matcher(Protocol):
    """The head of an objective that tells pairs that match from those that do not."""

    def match_logit(self, states: Tensor) -> Tensor:
        """(M,) log of the odds that a pair matches, of (M, W) states that have read text and image."""
        ...


def compared_by(objectives: Mapping[str, Objective]) -> bool:
    """Whether one of a run's objectives trains embeddings that can be compared."""
    return any(wanted.what == TEXT.what for each in objectives.values() for wanted in each.passes)


def matcher_of(objectives: Mapping[str, Objective]) -> Matcher | None:
    """The first of a run's objectives that is one."""
    return next((each for each in objectives.values() if isinstance(each, Matcher)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A model with what it takes to run it."""

    model: Dual
    tokenizer: Tokenizer
    compute: Compute
    batch: int = 256
    """Images that are encoded at a time."""
    compares: bool = True
    """Whether the embeddings of images and texts were trained to be compared."""
    matcher: Matcher | None = None
    """What says whether an image and a text match, where the model was trained to."""
    rerank: int = 16
    """The nearest answers of a query that the matcher puts into a new order; 0 for none."""
    asked: Callable[[], bool] = lambda: False
    """Whether to stop before all of it was judged; one rank's word is enough."""

    @contextmanager
    def _running(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.compute.forward():
                yield
        finally:
            self.model.train(training)

    @property
    def embeds(self) -> bool:
        """Whether images and texts are compared."""
        return self.compares and self.model.text is not None

    @property
    def writes(self) -> bool:
        """Whether it writes captions."""
        return self.model.captioner is not None

    @property
    def matches(self) -> bool:
        """Whether what is nearest is read again, text and image together."""
        return self.embeds and self.matcher is not None and self.rerank > 0

    def look(self, batch: Batch, *, write: bool = True) -> Look:
        """Run every encoder once; `write` says whether captions are generated, which takes longest."""
        with self._running():
            batch = batch.to(self.compute.device)
            encodings = ModelEncodings(self.model, batch, group=None, key=())
            features = encodings[IMAGE] if self.embeds else encodings[IMAGE_TOKENS].mean(1)
            texts = encodings[TEXT].float().cpu() if self.embeds else None
            loss, tokens = self._likelihood(encodings, batch) if self.writes else (0.0, 0)
            said = self._write(encodings[IMAGE_TOKENS]) if self.writes and write else None
        return Look(features=features.float().cpu(), texts=texts, said=said, loss=loss, tokens=tokens)

    def image_tokens(self, batch: Batch) -> Tensor:
        """(B, P, W) of a batch, on the device."""
        with self._running():
            return self.model.encode_image(batch.images.to(self.compute.device))["image_tokens"]

    def match(self, image_tokens: Tensor, pairs: Pairs) -> Tensor:
        """(M,) float32 log of the odds that each pair of (B, P, W) images and texts matches."""
        assert self.matcher is not None
        with self._running():
            return self.matcher.match_logit(self.model.encode_fused(image_tokens, pairs)).float().cpu()

    def sentences(self, sentences: Sequence[str]) -> Tensor:
        """(N, D) float32 embeddings of plain sentences."""
        ids = [torch.tensor(self.tokenizer.encode(sentence)) for sentence in sentences]
        found: list[Tensor] = []
        for start in range(0, len(ids), _SENTENCES):
            part = ids[start : start + _SENTENCES]
            tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(self.compute.device)
            length = torch.tensor([len(each) for each in part], device=self.compute.device)
            with self._running():
                found.append(self.model.encode_text(tokens, length)["text"].float().cpu())
        return torch.cat(found)

    def _likelihood(self, encodings: ModelEncodings, batch: Batch) -> tuple[float, int]:
        # What lm minimises is the negative log likelihood of the tokens that it counts.
        widths = Widths(
            embed=0, image_tokens=0, text_tokens=0, vocabulary=0, temperature=False, contrast=False
        )
        lm = LM(LM.Config(), widths)
        tokens = int(lm.denominator(batch))
        return (float(lm(encodings, batch).total) if tokens else 0.0), tokens

    def _write(self, image_tokens: Tensor) -> tuple[str, ...]:
        assert self.model.captioner is not None
        assert self.tokenizer.start is not None
        ids = greedy(self.model.captioner, image_tokens, start=self.tokenizer.start, end=self.tokenizer.end)
        return tuple(self.tokenizer.decode(each) for each in ids)
