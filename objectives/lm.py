"""Captioning: the next token of a text, given the tokens before it and its image, where it has one.

N texts, T tokens, M scored tokens, Dt width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from datasets.batch import Batch
from datasets.errors import UserError
from datasets.source import Field
from objectives.base import DECODED, Encodings, Objective, Terms, Widths


class LM(Objective):
    """Cross-entropy of every token after the start, end included, over the tokens of the global batch.

    Padding, masked slots and, among images, texts without one are not scored. A batch of texts alone is
    language modelling with the same decoder.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """Settings of lm."""

        smoothing: float = 0.0
        """Label smoothing (BLIP 0.1, CoCa 0)."""
        z_loss: float = 0.0
        """Factor of (log Z)^2, Z the softmax's denominator, so that logits do not drift (Chameleon 1e-5)."""

        def check(self, flag: str) -> None:
            """Refuse also a negative factor; see `Objective.Config.check`."""
            super().check(flag)
            if self.z_loss < 0:
                raise UserError(f"{flag}.z-loss is {self.z_loss}; it is a factor of 0 or more")

    needs: ClassVar[frozenset[Field]] = frozenset({"text"})
    passes = (DECODED,)

    def __init__(self, config: LM.Config, widths: Widths) -> None:
        super().__init__()
        self.smoothing, self.z_loss = config.smoothing, config.z_loss

    def denominator(self, batch: Batch) -> Tensor:
        """Tokens."""
        return _scored(batch).sum()

    def forward(self, encodings: Encodings, batch: Batch) -> Terms:
        """Sum over the scored tokens."""
        scored = _scored(batch)  # (N, T-1)
        states = encodings[DECODED][scored]  # (M, Dt)
        targets = batch.tokens[:, 1:][scored]  # (M,)
        total, hits = encodings.vocabulary_loss(states, targets, smoothing=self.smoothing, z_loss=self.z_loss)
        return Terms(total, {"accuracy": hits})


def _scored(batch: Batch) -> Tensor:
    """(N, T-1) bool: tokens that are predicted."""
    texts = batch.pair_valid if len(batch.images) else batch.text_valid
    return batch.token_mask[:, 1:] & texts[:, None]
