"""A run as a directory that `open_clip.create_model_and_transforms('local-dir:OUT')` loads.

It holds open_clip_config.json (model_cfg and preprocess_cfg), open_clip_model.safetensors, and the files of a
tokenizer where that is not CLIP's own, which open_clip brings along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from datasets.errors import UserError
from datasets.tokens import OpenClipTokens, TrainedBPE
from pretrain.evaluate.subject import Subject
from pretrain.export.preprocessing import normalisation_of
from pretrain.export.proof import Written
from pretrain.export.tokenizer_files import write_tokenizer
from pretrain.zoo.coca import CoCaDecoder
from pretrain.zoo.definition import CONFIG, WEIGHTS, define
from pretrain.zoo.dual import Dual
from pretrain.zoo.models import DualConfig, OpenClipConfig
from pretrain.zoo.text import HubText, OpenClipText
from pretrain.zoo.vision import TimmTower
from pretrain.zoo.whole import open_clip_state

_CLEANED = (
    "open_clip cleans captions before its tokenizer (curly quotes, ligatures, HTML entities, damaged "
    "encodings); this run was trained on captions as they are, in lower case. Where that makes a difference, "
    "the ids are those of the cleaned caption."
)


def write_open_clip(subject: Subject, folder: Path) -> list[str]:
    """Write configuration, weights and tokenizer into an empty directory; returns what to know about them.

    Raises:
        UserError: open_clip has no shape for a part of this model; names the part.
    """
    config = model_config(subject)
    preprocess = {
        **asdict(normalisation_of(subject.model.image)),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "size": subject.resolution,
    }
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    state = {key: value.contiguous() for key, value in state_of(subject.model, config).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    tokenizer = subject.tokenizer
    if not isinstance(tokenizer, OpenClipTokens):
        write_tokenizer(tokenizer, folder, end=tokenizer.end, pad=tokenizer.pad)
    notes = [_CLEANED] if isinstance(tokenizer, TrainedBPE) else []
    if source := config["text_cfg"].get("hf_model_name"):
        notes.append(f"open_clip reads the configuration of the text tower from `{source}`.")
    return notes


def read_open_clip(folder: Path) -> Written:
    """Load the directory as a user of open_clip does.

    Raises:
        UserError: open_clip builds another model from the configuration than the weights belong to.
    """
    import open_clip

    name, library = f"local-dir:{folder}", f"open_clip {open_clip.__version__}"
    try:
        built, _, preprocess = open_clip.create_model_and_transforms(name)
    except RuntimeError as error:  # it loads strictly
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{library} cannot hold this model, of which it builds another: {reason}") from error
    model: Any = built.eval()
    tokenize: Any = open_clip.get_tokenizer(name)
    see: Any = preprocess

    def images(pictures: list[Image]) -> Tensor:
        return model.encode_image(torch.stack([see(picture) for picture in pictures]), normalize=True)

    def written_words(pictures: list[Image], captions: list[str]) -> Tensor:
        return model(torch.stack([see(picture) for picture in pictures]), tokenize(captions))["logits"]

    return Written(
        library=library,
        images=images,
        texts=lambda captions: model.encode_text(tokenize(captions), normalize=True),
        logits=written_words if isinstance(model, open_clip.CoCa) else None,
        logit_scale=model.logit_scale,
        logit_bias=model.logit_bias,
    )


def model_config(subject: Subject) -> dict[str, Any]:
    """open_clip's `model_cfg` of the run's model, at the resolution it was last trained with.

    Raises:
        UserError: a part that open_clip has no shape for.
    """
    assert subject.run is not None
    model, config = subject.model, subject.run.model
    if not isinstance(model.captioner, CoCaDecoder | None):
        raise UserError(
            "the captioner is Medley's own, and open_clip has none beside a dual encoder: leave it out, "
            "knowingly, with --without captioner"
        )
    if isinstance(config, OpenClipConfig):
        described = _whole(config, subject)
    else:
        assert isinstance(config, DualConfig), type(config)
        described = _dual(config, subject)
    if not isinstance(subject.tokenizer, OpenClipTokens):
        described["text_cfg"].setdefault("hf_tokenizer_name", "./")  # beside the configuration
    described["vision_cfg"]["image_size"] = subject.resolution
    described["vision_cfg"].pop("timm_model_pretrained", None)
    described["quick_gelu"] = _has_quick_gelu(model)
    if model.logit_bias is None:
        described.pop("init_logit_bias", None)
    else:
        described.setdefault("init_logit_bias", model.logit_bias.item())
    return described


def _whole(config: OpenClipConfig, subject: Subject) -> dict[str, Any]:
    """What the model was built from, without CoCa's decoder where the run has none."""
    described = define(config.name).config
    _refuse_other_size(f"open_clip:{config.name}", subject)
    if subject.model.captioner is None:
        described.pop("multimodal_cfg", None)
        for tower in ("vision_cfg", "text_cfg"):
            described[tower].pop("output_tokens", None)  # they are for the decoder
    return described


def _dual(config: DualConfig, subject: Subject) -> dict[str, Any]:
    """An image tower beside the small text tower with its own vocabulary."""
    kind, _, name = config.image.partition(":")
    if kind == "open_clip":
        vision = define(name).config["vision_cfg"]
        vision.pop("output_tokens", None)
    else:
        assert kind == "timm", config.image
        vision = {"timm_model_name": name, "timm_pool": ""}
    _refuse_other_size(config.image, subject)
    image = subject.model.image
    if _has_quick_gelu(image):
        raise UserError(
            f"the image tower {config.image!r} has QuickGELU and the text tower beside it has not, and "
            "open_clip knows them only in both: --to transformers can hold it"
        )
    if isinstance(image, TimmTower) and isinstance(image.head, nn.Identity):
        vision["timm_proj"] = "linear"  # with timm_pool "" and no projection nothing would be pooled
    tower = cast(OpenClipText, subject.model.text).tower
    return {
        "embed_dim": image.embed,
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": tower.context_length,
            "vocab_size": tower.vocab_size,
            "width": tower.width,
            "heads": tower.heads,
            "layers": tower.transformer.layers,
            "pool_type": tower.pool_type,
            "eos_id": tower.eos_id,
        },
    }


def _refuse_other_size(name: str, subject: Subject) -> None:
    """open_clip does not tell timm how large images are; its towers with positions have their own size."""
    image = subject.model.image
    if not isinstance(image, TimmTower) or not hasattr(image.trunk, "set_input_size"):
        return
    own = image.trunk.default_cfg["input_size"][-1]
    if own != subject.resolution:
        raise UserError(
            f"open_clip builds the image tower {name!r} for images of {own} px only, and this run was "
            f"trained with {subject.resolution} px: train it with {own} px, take a tower of open_clip's own, "
            "such as open_clip:ViT-S-32-alt, or export SigLIP's --to transformers"
        )


def _has_quick_gelu(model: nn.Module) -> bool:
    from open_clip.transformer import QuickGELU

    return any(isinstance(part, QuickGELU) for part in model.modules())


def state_of(model: Dual, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every weight under the name it has in open_clip's model of that configuration."""
    image, vision = model.image, config["vision_cfg"]
    # open_clip.CLIP keeps the parts of its text tower at the top, its other classes in one module.
    custom = config.get("custom_text", False) or isinstance(model.text, HubText)
    state = open_clip_state(model, custom_text=custom)
    if vision.get("timm_proj") == "linear":
        state.setdefault("visual.head.proj.weight", torch.eye(image.embed))
    if isinstance(image, TimmTower) and getattr(image.trunk, "dynamic_img_size", False):
        # Its positions are those of the first stage, resampled in every forward; open_clip's have one size.
        trunk = deepcopy(image.trunk)
        trunk.set_input_size(vision["image_size"])
        state |= {f"visual.trunk.{key}": value for key, value in trunk.state_dict().items()}
    return state
