"""A dual encoder with a captioner and a fusion tower: what objectives are served from.

B images, N texts, M pairs of them, T tokens, P image tokens, D embedding width, W the text tower's width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.errors import UserError
from objectives.base import Pairs, Pass, Tower, View, What
from objectives.contrast import MAX_LOGIT_SCALE
from pretrain.zoo.towers import FusionTower, ImageTower, TextDecoder, TextTower

Run = tuple[Tower, View, View]


class Dual(nn.Module):
    """Two towers, one temperature, a captioner on the image tokens, and a tower that reads text and image.

    Parts that no objective reads are not built, so no optimizer step is spent on them.
    """

    def __init__(
        self,
        *,
        image: ImageTower,
        text: TextTower | None,
        captioner: TextDecoder | None,
        fusion: FusionTower | None,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self.captioner = captioner
        self.fusion = fusion
        self.logit_scale = nn.Parameter(logit_scale.reshape(1))
        self.logit_bias = None if logit_bias is None else nn.Parameter(logit_bias.reshape(1))

    def gives(self) -> dict[Run, tuple[What, ...]]:
        """Every run this model can make, and what it says."""
        given: dict[Run, tuple[What, ...]] = {("image", "clean", "none"): ("image", "image_tokens")}
        if self.text is not None:
            given["text", "none", "clean"] = ("text", "text_tokens")
        if self.captioner is not None:
            given["captioner", "clean", "clean"] = ("decoded",)
        if self.fusion is not None:
            given["fusion", "clean", "clean"] = ("fused",)
        return given

    def encode_image(self, images: Tensor) -> dict[What, Tensor]:
        """(B, 3, H, W) uint8 -> `image` (B, D) of unit norm and `image_tokens` (B, P, Dv)."""
        pooled, tokens = self.image(images)
        return {"image": _unit(pooled), "image_tokens": tokens}

    def encode_text(self, tokens: Tensor, length: Tensor) -> dict[What, Tensor]:
        """(N, T) ids of (N,) lengths -> `text` (N, D) of unit norm and `text_tokens` (N, T, Dt)."""
        assert self.text is not None
        pooled, states = self.text(tokens, length)
        return {"text": _unit(pooled), "text_tokens": states}

    def encode_fused(self, image_tokens: Tensor, pairs: Pairs) -> Tensor:
        """(M, W) the state of each pair that has read the image, among (B, P, Dv), and the text."""
        assert self.fusion is not None
        return self.fusion(image_tokens, pairs.image, pairs.tokens, pairs.text_length)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the scale at 100 or below, outside the graph (CLIP, arXiv 2103.00020, section 2.5)."""
        self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def _unit(pooled: Tensor) -> Tensor:
    """Norms are taken in float32 whatever autocast made of the embedding."""
    return F.normalize(pooled.to(torch.promote_types(pooled.dtype, torch.float32)), dim=-1)


def check_served(gives: dict[Run, tuple[What, ...]], name: str, passes: Iterable[Pass]) -> None:
    """Refuse an objective that reads what the model cannot say.

    Raises:
        UserError: names the pass and lists what there is.
    """
    for wanted in passes:
        if wanted.what not in gives.get(wanted.run, ()):
            there = ", ".join(sorted(what for says in gives.values() for what in says))
            raise UserError(
                f"objective {name!r} reads {wanted.what!r} (image {wanted.image}, text {wanted.text}), "
                f"which this model cannot give; it gives {there} of clean inputs"
            )
