"""Recall of a checkpoint of either system, by the same code: Medley's towers and its `recalls`.

B images, N texts of all validation data, D embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file

from datasets.batch import Batch
from datasets.collate import collate
from datasets.sources import open_source
from datasets.tokens import Tokenizer
from pretrain.evaluate.retrieval import recalls
from pretrain.zoo.dual import Dual
from pretrain.zoo.models import OpenClipConfig, build_model, own_tokenizer

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Validation data, read once."""

    model: str
    """An open_clip model configuration, JSON."""
    resolution: int
    tokenizer: Tokenizer
    batches: Sequence[Batch]

    @classmethod
    def on(cls, patterns: str, *, model: str, resolution: int) -> Self:
        """Read tar shards, in the fixed view and with all captions."""
        tokenizer = own_tokenizer(OpenClipConfig(name=model))
        assert tokenizer is not None
        source = open_source(patterns, seed=0, split="test")
        assert source.size is not None
        samples = [source.read(i, seed=(i,), resolution=resolution) for i in range(source.size)]
        readable = [sample for sample in samples if not sample.fault]
        parts = [readable[first : first + _BATCH] for first in range(0, len(readable), _BATCH)]
        batches = [collate(part, tokenizer, resolution=resolution) for part in parts]
        return cls(model=model, resolution=resolution, tokenizer=tokenizer, batches=batches)

    @torch.no_grad()
    def recall(self, weights: Path) -> dict[str, float]:
        """`image_to_text_recall@1` and so on, in float32."""
        model = self._model(weights).eval()
        images = torch.cat([model.encode_image(batch.images)["image"] for batch in self.batches])
        texts = [model.encode_text(batch.tokens, batch.text_length)["text"] for batch in self.batches]
        owner = torch.cat([batch.image_index + n * _BATCH for n, batch in enumerate(self.batches)])
        text_id = torch.cat([batch.text_id for batch in self.batches])
        return recalls(images, torch.cat(texts), owner=owner, text_id=text_id)

    def _model(self, weights: Path) -> Dual:
        """The weights of a run of Medley, or of open_clip, which calls the same towers by other names."""
        named = load_file(weights)
        ours = any(name.startswith("model.") for name in named)
        config = OpenClipConfig(name=self.model, pretrained="" if ours else str(weights))
        model = build_model(config, tokenizer=self.tokenizer, resolution=self.resolution, temperature=None)
        if ours:
            model.captioner = None  # which a run without `lm` does not have
            model.load_state_dict({name.removeprefix("model."): each for name, each in named.items()})
        return model


def write_initial(path: Path, *, model: str, seed: int) -> None:
    """Random weights for both systems, by open_clip's own initialisation."""
    from open_clip import CLIP

    torch.manual_seed(seed)
    built = CLIP(**json.loads(Path(model).read_bytes()))
    save_file({name: each.contiguous() for name, each in built.state_dict().items()}, path)
