"""What the encoders say about one micro-batch, each pass computed at most once.

B images, N texts, T tokens, D embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from datasets.batch import Batch
from objectives.base import FUSED, IMAGE_TOKENS, Pairs, Pass, What
from pretrain.zoo.dual import Dual, Run


class ModelEncodings:
    """Answers passes by running towers on first use; implements `objectives.base.Encodings`."""

    def __init__(
        self,
        model: Dual,
        batch: Batch,
        *,
        group: ProcessGroup | None,
        key: tuple[int, ...],
        piece: tuple[int, ...] = (),
        given: Mapping[Pass, Tensor] | None = None,
    ) -> None:
        """Nothing is run yet.

        Args:
            model: the encoders.
            batch: what they encode.
            group: the ranks that share the global batch.
            key: of this step, the same on every rank.
            piece: which micro-batch it is; with the key, that of the towers' own randomness.
            given: passes that are known already: those of the whole step, for a coupled objective.
        """
        self.group = group
        self.key = key
        self._seed = (*key, *piece)
        self._model = model
        self._batch = batch
        self._given = given or {}
        self._runs: dict[Run, dict[What, Tensor]] = {}

    @property
    def logit_scale(self) -> Tensor:
        """(1,) the model's own log temperature."""
        return self._model.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        """(1,) the model's own bias."""
        return self._model.logit_bias

    def __getitem__(self, wanted: Pass) -> Tensor:
        """The tensor of a pass."""
        if wanted in self._given:
            return self._given[wanted]
        if wanted.run not in self._runs:
            self._runs[wanted.run] = self._encode(wanted.run)
        return self._runs[wanted.run][wanted.what]

    def fused(self, pairs: Pairs) -> Tensor:
        """(M, Dt) states that have read text and image; see `objectives.base.Encodings`."""
        image_tokens = self[IMAGE_TOKENS]
        _seed_tower((*self._seed, *FUSED.run))
        return self._model.encode_fused(image_tokens, pairs)

    def vocabulary_loss(
        self, states: Tensor, targets: Tensor, *, smoothing: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        """() sum of cross-entropies and () count of hits; see `objectives.base.Encodings`."""
        assert self._model.captioner is not None
        return self._model.captioner.head(states, targets, smoothing=smoothing, z_loss=z_loss)

    def _encode(self, run: Run) -> dict[What, Tensor]:
        tower, image_view, text_view = run
        batch, model = self._batch, self._model
        key = (*self._seed, *run)
        if tower == "image":
            _seed_tower(key)
            return model.encode_image(batch.images)
        if tower == "text":
            _seed_tower(key)
            return model.encode_text(batch.tokens, batch.text_length)
        assert model.captioner is not None
        context = None
        if len(batch.images):
            # A text without image among others has index -1 and is never scored: any image will do.
            image_tokens = self[Pass("image_tokens", image=image_view, text="none")]
            context = image_tokens[batch.image_index.clamp(min=0)]
        # The text tower is causal wherever its states are read, so the last token is in none but its own.
        states = Pass("text_tokens", image="none", text=text_view)
        text = self[states] if model.captioner.reads_states else batch.tokens
        _seed_tower(key)
        return {"decoded": model.captioner(context, text[:, :-1])}


def _seed_tower(key: tuple[int | str, ...]) -> None:
    """Seed the towers' own randomness by (run, step, rank, micro-batch, tower, views).

    Keyed by the run of the tower and not by the order of runs: the second pass over a micro-batch is then
    the first one again, a resumed step the lost one again, and no generator state is kept anywhere.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
