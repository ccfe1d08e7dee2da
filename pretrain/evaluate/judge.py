"""A model as evaluation sees it: no gradient, training's own arithmetic, one batch at a time.

B images, N texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.batch import Batch
from datasets.tokens import Tokenizer
from pretrain.precision import Compute
from pretrain.zoo.dual import Dual
from pretrain.zoo.generate import greedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A model with what it takes to run it."""

    model: Dual
    tokenizer: Tokenizer
    compute: Compute

    @contextmanager
    def _running(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.compute.forward():
                yield
        finally:
            self.model.train(training)

    def images(self, batch: Batch) -> Tensor:
        """(B, D) float32 embeddings."""
        with self._running():
            return self.model.encode_image(batch.to(self.compute.device).images)["image"].float().cpu()

    def texts(self, batch: Batch) -> Tensor:
        """(N, D) float32 embeddings."""
        with self._running():
            moved = batch.to(self.compute.device)
            return self.model.encode_text(moved.tokens, moved.text_length)["text"].float().cpu()

    def sentences(self, sentences: Sequence[str]) -> Tensor:
        """(N, D) float32 embeddings of plain sentences."""
        ids = [self.tokenizer.encode(sentence) for sentence in sentences]
        length = torch.tensor([len(each) for each in ids])
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in ids], batch_first=True)
        with self._running():
            device = self.compute.device
            return self.model.encode_text(tokens.to(device), length.to(device))["text"].float().cpu()

    def captions(self, batch: Batch) -> list[str]:
        """The greedy caption of each of the B images."""
        assert self.model.captioner is not None
        with self._running():
            tokens = self.model.encode_image(batch.to(self.compute.device).images)["image_tokens"]
            ids = greedy(self.model.captioner, tokens, start=self.tokenizer.start, end=self.tokenizer.end)
        return [self.tokenizer.decode(each) for each in ids]
