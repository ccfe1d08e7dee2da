"""Weights of open_clip's and timm's towers under the names that transformers gives them.

A name stands for a module, whose weight and bias follow it, or for a parameter; `*` is a block's number. What
a table does not name has no place in transformers, so nothing is left out unseen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

Names = Mapping[str, tuple[str, ...]]
"""Where a weight goes; several names share the rows of one tensor in equal parts."""

_QKV = tuple(f"encoder.layers.*.self_attn.{part}_proj" for part in "qkv")


def _block(theirs: str) -> str:
    return f"encoder.layers.*.{theirs}"


def _open_clip_blocks() -> dict[str, tuple[str, ...]]:
    here = "transformer.resblocks.*"
    return {
        f"{here}.ln_1": (_block("layer_norm1"),),
        f"{here}.attn.in_proj_weight": tuple(f"{part}.weight" for part in _QKV),
        f"{here}.attn.in_proj_bias": tuple(f"{part}.bias" for part in _QKV),
        f"{here}.attn.out_proj": (_block("self_attn.out_proj"),),
        f"{here}.ln_2": (_block("layer_norm2"),),
        f"{here}.mlp.c_fc": (_block("mlp.fc1"),),
        f"{here}.mlp.c_proj": (_block("mlp.fc2"),),
    }


OPEN_CLIP_IMAGE: Names = {
    "class_embedding": ("embeddings.class_embedding",),
    "conv1": ("embeddings.patch_embedding",),
    "positional_embedding": ("embeddings.position_embedding.weight",),
    "ln_pre": ("pre_layrnorm",),  # spelt so
    **_open_clip_blocks(),
    "ln_post": ("post_layernorm",),
}
"""open_clip's VisionTransformer as a CLIPVisionModel, but for the projection."""

TIMM_IMAGE: Names = {
    "patch_embed.proj": ("embeddings.patch_embedding",),
    "pos_embed": ("embeddings.position_embedding.weight",),
    "blocks.*.norm1": (_block("layer_norm1"),),
    "blocks.*.attn.qkv": _QKV,
    "blocks.*.attn.proj": (_block("self_attn.out_proj"),),
    "blocks.*.norm2": (_block("layer_norm2"),),
    "blocks.*.mlp.fc1": (_block("mlp.fc1"),),
    "blocks.*.mlp.fc2": (_block("mlp.fc2"),),
    "norm": ("post_layernorm",),
    "attn_pool.latent": ("head.probe",),
    "attn_pool.in_proj_weight": ("head.attention.in_proj_weight",),
    "attn_pool.in_proj_bias": ("head.attention.in_proj_bias",),
    "attn_pool.proj": ("head.attention.out_proj",),
    "attn_pool.norm": ("head.layernorm",),
    "attn_pool.mlp.fc1": ("head.mlp.fc1",),
    "attn_pool.mlp.fc2": ("head.mlp.fc2",),
}
"""timm's VisionTransformer with attention pooling as a SiglipVisionModel."""

OPEN_CLIP_TEXT: Names = {
    "token_embedding": ("embeddings.token_embedding",),
    "positional_embedding": ("embeddings.position_embedding.weight",),
    **_open_clip_blocks(),
    "ln_final": ("final_layer_norm",),
}
"""open_clip's TextTransformer as a CLIPTextModel or SiglipTextModel, but for the projection."""


def renamed(state: Mapping[str, Tensor], names: Names, *, prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that have a name in the table, and the keys of those that have none."""
    found: dict[str, Tensor] = {}
    strange: list[str] = []
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        ours, suffix = (module, f".{leaf}") if leaf in ("weight", "bias") else (key, "")
        number = re.search(r"(?<=\.)\d+(?=\.)", ours)
        theirs = names.get(ours if number is None else ours.replace(number[0], "*", 1), ())
        if not theirs:
            strange.append(key)
            continue
        for name, part in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            place = name if number is None else name.replace("*", number[0])
            found[f"{prefix}{place}{suffix}"] = part
    return found, strange
