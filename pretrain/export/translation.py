"""The towers of a run in the words of transformers, or the reason why it has none for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from datasets.errors import UserError
from pretrain.evaluate.subject import Subject
from pretrain.export.renaming import OPEN_CLIP_IMAGE, OPEN_CLIP_TEXT, TIMM_IMAGE, Names, renamed
from pretrain.zoo.models import DualConfig, OpenClipConfig
from pretrain.zoo.text import OpenClipText
from pretrain.zoo.vision import OpenClipTower, TimmTower


@dataclass(frozen=True, slots=True, kw_only=True)
class Translated:
    """One tower as transformers has it."""

    config: dict[str, Any]
    """Of the tower's configuration class."""
    state: dict[str, Tensor]
    """By the keys of the whole model."""


def clip_image(subject: Subject) -> Translated:
    """open_clip's own vision transformer as CLIPModel's.

    Raises:
        UserError: it is another kind of tower; names what is other about it.
    """
    image, part = subject.model.image, image_name(subject)
    assert isinstance(image, OpenClipTower), type(image)
    visual: Any = image.visual
    if visual.pool_type != "tok":
        raise _misfit(part, "pools all its tokens, and CLIPModel only a class token")
    state = dict(visual.state_dict())
    projection = state.pop("proj")
    config = {
        **_sizes(visual, visual.transformer.resblocks, part=part),
        "image_size": subject.resolution,
        "patch_size": visual.patch_size[0],
        "projection_dim": image.embed,
    }
    named = _renamed(state, OPEN_CLIP_IMAGE, prefix="vision_model.", part=part)
    return Translated(config=config, state={**named, "visual_projection.weight": projection.T})


def siglip_image(subject: Subject) -> Translated:
    """Timm's vision transformer with attention pooling as SiglipModel's.

    Raises:
        UserError: it is another kind of tower; names what is other about it.
    """
    from timm.models.vision_transformer import VisionTransformer

    image, part = subject.model.image, image_name(subject)
    trunk = image.trunk if isinstance(image, TimmTower) else None
    if (
        not isinstance(image, TimmTower)
        or not isinstance(trunk, VisionTransformer)
        or trunk.attn_pool is None
    ):
        raise _misfit(
            part,
            "is neither a vision transformer of open_clip's own, as CLIPModel has it, nor one of timm's with "
            "attention pooling, as SiglipModel has it",
        )
    if not isinstance(image.head, nn.Identity) or not isinstance(image.project, nn.Identity):
        raise _misfit(part, "ends in a projection, and that of SiglipModel does not")
    state = dict(trunk.state_dict())
    if trunk.pos_embed is not None:
        state["pos_embed"] = state["pos_embed"].squeeze(0)  # that of a batch of one
    for kind in ("weight", "bias"):
        query, rest = (state.pop(f"attn_pool.{each}.{kind}") for each in ("q", "kv"))
        state[f"attn_pool.in_proj_{kind}"] = torch.cat([query, rest])
    config = {
        **_sizes(trunk, trunk.blocks, part=part),
        "image_size": subject.resolution,
        "patch_size": trunk.patch_embed.patch_size[0],
    }
    return Translated(config=config, state=_renamed(state, TIMM_IMAGE, prefix="vision_model.", part=part))


def clip_text(subject: Subject, *, end: int) -> Translated:
    """A causal text tower as CLIPModel's.

    Args:
        subject: the run.
        end: the id of the end token there; if it is another one than was trained with, its row is copied.

    Raises:
        UserError: it is another kind of tower; names what is other about it.
    """
    text, part = _own_text(subject), "the text tower"
    tower = text.tower
    if tower.attn_mask is None or tower.pool_type not in ("argmax", "eos"):
        raise _misfit(part, "is not causal and read at an end token, as that of CLIPModel is")
    state, projection = _apart(text)
    if "bias" in projection:
        raise _misfit(part, "ends in a projection with bias, and that of CLIPModel has none")
    rows = state["token_embedding.weight"]
    if end != subject.tokenizer.end:
        more = rows.new_zeros(max(0, end + 1 - len(rows)), rows.shape[1])
        state["token_embedding.weight"] = rows = torch.cat([rows, more])
        rows[end] = rows[subject.tokenizer.end]
    config = {
        **_text_sizes(tower, part=part),
        "vocab_size": len(rows),
        "projection_dim": text.embed,
        "bos_token_id": subject.tokenizer.start,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    named = _renamed(state, OPEN_CLIP_TEXT, prefix="text_model.", part=part)
    return Translated(config=config, state={**named, "text_projection.weight": projection["weight"]})


def siglip_text(subject: Subject) -> Translated:
    """A text tower that sees its padding as SiglipModel's.

    Raises:
        UserError: it is another kind of tower; names what is other about it.
    """
    text, part = _own_text(subject), "the text tower"
    tower = text.tower
    if tower.attn_mask is not None or tower.use_pad_mask or tower.pool_type != "last":
        raise _misfit(part, "is not read at its last column without a mask, as that of SiglipModel is")
    state, projection = _apart(text)
    projection.setdefault("bias", torch.zeros(text.embed))
    config = {
        **_text_sizes(tower, part=part),
        "vocab_size": tower.vocab_size,
        "projection_size": text.embed,
        "bos_token_id": subject.tokenizer.start,
        "eos_token_id": subject.tokenizer.end,
        "pad_token_id": text.pad_id,
    }
    head = {f"text_model.head.{kind}": value for kind, value in projection.items()}
    return Translated(
        config=config, state={**_renamed(state, OPEN_CLIP_TEXT, prefix="text_model.", part=part), **head}
    )


def image_name(subject: Subject) -> str:
    """The image tower as a user knows it."""
    assert subject.run is not None
    config = subject.run.model
    assert isinstance(config, DualConfig | OpenClipConfig), type(config)
    return (
        f"the image tower {config.image if isinstance(config, DualConfig) else f'open_clip:{config.name}'!r}"
    )


def _misfit(part: str, why: str) -> UserError:
    return UserError(f"{part} {why}: transformers has no place for it, try --to open_clip")


def _own_text(subject: Subject) -> OpenClipText:
    if not isinstance(subject.model.text, OpenClipText):
        raise _misfit("the text tower", "is one of transformers' language models, not one of open_clip's own")
    return subject.model.text


def _apart(text: OpenClipText) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a text tower without its projection, and that as weight and bias of a linear layer."""
    state = dict(text.tower.state_dict())
    if text.tower.text_projection is None:
        return state, {"weight": torch.eye(text.embed)}
    if "text_projection" in state:
        return state, {"weight": state.pop("text_projection").T}
    kinds = [kind for kind in ("weight", "bias") if f"text_projection.{kind}" in state]
    return state, {kind: state.pop(f"text_projection.{kind}") for kind in kinds}


def _renamed(state: dict[str, Tensor], names: Names, *, prefix: str, part: str) -> dict[str, Tensor]:
    found, strange = renamed(state, names, prefix=prefix)
    if strange:
        raise _misfit(part, f"has `{strange[0]}`")
    return found


def _text_sizes(tower: Any, *, part: str) -> dict[str, Any]:
    sizes = _sizes(tower, tower.transformer.resblocks, part=part)
    return {**sizes, "max_position_embeddings": tower.context_length}


def _sizes(tower: nn.Module, blocks: Any, *, part: str) -> dict[str, Any]:
    """What transformers says of a tower's blocks. It has one activation and one epsilon in all of them."""
    first = blocks[0]
    kinds = {activation for each in tower.modules() if (activation := _activation(each))}
    epsilons = {each.eps for each in tower.modules() if isinstance(each, nn.LayerNorm)}
    for several, what in ((kinds, "activations"), (epsilons, "epsilons of its norms")):
        if len(several) != 1:
            raise _misfit(part, f"has these {what}: {', '.join(map(str, sorted(several))) or 'none known'}")
    up = first.mlp.c_fc if hasattr(first.mlp, "c_fc") else first.mlp.fc1
    return {
        "hidden_size": up.in_features,
        "intermediate_size": up.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": kinds.pop(),
        "layer_norm_eps": epsilons.pop(),
    }


def _activation(module: nn.Module) -> str | None:
    """The name of an activation in transformers; None for any other module."""
    from open_clip.transformer import QuickGELU
    from timm.layers.activations import GELU, GELUTanh

    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, GELUTanh) or (isinstance(module, nn.GELU) and module.approximate == "tanh"):
        return "gelu_pytorch_tanh"
    return "gelu" if isinstance(module, nn.GELU | GELU) else None
