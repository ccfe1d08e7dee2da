"""Layer decay: in a tower, each layer learns slower than the one above it.

The rule is that of timm (param_groups_layer_decay) and of BEiT (arXiv 2106.08254): what stands before the
first block is the lowest layer, each block is one, and a head is the highest, whose scale is 1. What projects
a tower's pooled state is its head, so the last block is one decay below 1 even where the model itself ends
with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from datasets.errors import UserError

_HEAD = "_head"
"""A name that no model's own description gives to a layer."""
_OPEN_CLIP = {
    "stem": r"^(?:class_embedding|cls_emb|positional_embedding|conv1|ln_pre|token_embedding)",
    "blocks": [(r"^transformer\.resblocks\.(\d+)", None), (r"^ln_(?:post|final)", (99999,))],
}
"""Both towers of open_clip, with the lines that its `lock` draws; 99999 is timm's word for the last block."""
_HUB = {
    "stem": r"(?!.*\.(?:layer|layers|block|h)\.\d+\.).*(?:embed|shared|wte|wpe)",
    "blocks": [(r".*?\.(?:layer|layers|block|h)\.(\d+)\.", None)],
}
"""Text models of transformers behind open_clip's HFTextEncoder."""


def layer_scales(module: nn.Module, *, image: float, text: float) -> dict[str, float]:
    """Scales of the learning rate.

    Args:
        module: a `Pretrainer`.
        image: decay from a layer of its image tower to the one below; 1 for none.
        text: the same of its text tower.

    Returns:
        By parameter name, those below 1.

    Raises:
        UserError: a tower with a decay has no layers that are known, or is not there.
    """
    scales: dict[str, float] = {}
    for tower, decay in (("image", image), ("text", text)):
        if decay < 1:
            scales |= _scales_of(module, tower, decay)
    return scales


def _scales_of(module: nn.Module, tower: str, decay: float) -> dict[str, float]:
    flag = "layer_decay" if tower == "image" else "text_layer_decay"
    whole: Any = getattr(getattr(module, "model", None), tower, None)
    if whole is None:
        raise UserError(f"{flag} is {decay}, and this run has no {tower} tower that trains: leave it out")
    for part, stack in whole.named_children():
        if (matcher := _matcher(stack)) is not None:
            layers = _layers_of(stack, matcher)
            highest = layers.pop(_HEAD)
            return {
                f"model.{tower}.{part}.{name}": decay ** (highest - layer)
                for name, layer in layers.items()
                if layer < highest
            }
    raise UserError(
        f"{flag} is {decay}, and the layers of this {tower} tower are not known: leave it out, or take a "
        "tower of timm or open_clip"
    )


def _layers_of(stack: nn.Module, matcher: Any) -> dict[str, int]:
    """The layer of each parameter and of a head behind it all, as timm counts them."""
    from timm.models import group_parameters

    headed = nn.Module()
    for name, child in stack.named_children():
        headed.add_module(name, child)
    for name, parameter in stack.named_parameters(recurse=False):
        headed.register_parameter(name, parameter)
    headed.register_parameter(_HEAD, nn.Parameter(torch.empty(0)))
    layers: Any = group_parameters(headed, matcher, reverse=True)
    return layers


def _matcher(stack: nn.Module) -> Any:
    """Timm's description of a model's layers, or ours of the others' in its terms; None if there is none."""
    from open_clip.hf_model import HFTextEncoder
    from open_clip.transformer import TextTransformer, VisionTransformer

    if hasattr(stack, "group_matcher"):
        return stack.group_matcher(coarse=False)  # type: ignore[operator]
    if isinstance(stack, TextTransformer | VisionTransformer):
        return _OPEN_CLIP
    return _HUB if isinstance(stack, HFTextEncoder) else None
