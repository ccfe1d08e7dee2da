"""A run as a directory that transformers loads: a model, a processor and a tokenizer.

A run is a CLIPModel if its towers are a vision transformer of open_clip's own and a causal text tower, and a
SiglipModel if they are timm's vision transformer with attention pooling and a text tower that sees its
padding. Nothing else has a place in transformers: it is refused by the name of what does not fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from datasets.errors import UserError
from pretrain.evaluate.subject import Subject
from pretrain.export.preprocessing import normalisation_of
from pretrain.export.proof import Written
from pretrain.export.tokenizer_files import write_tokenizer
from pretrain.export.translation import clip_image, clip_text, image_name, siglip_image, siglip_text
from pretrain.zoo.vision import OpenClipTower

_LEGACY_END = 2
"""A CLIPModel with this end token reads a text at its largest id, for the sake of old configurations."""


def write_transformers(subject: Subject, folder: Path) -> list[str]:
    """Write configuration, weights, preprocessing and tokenizer into an empty directory.

    Returns what to know about them.

    Raises:
        UserError: transformers has no shape for a part of this model; names the part.
    """
    if subject.model.captioner is not None:
        raise UserError(
            "transformers has no captioner beside a dual encoder: leave it out, knowingly, with "
            "--without captioner"
        )
    write = _write_clip if isinstance(subject.model.image, OpenClipTower) else _write_siglip
    return write(subject, folder)


def read_transformers(folder: Path) -> Written:
    """Load the directory as a user of transformers does."""
    import transformers

    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    see: Any = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)

    def images(pictures: list[Image]) -> Tensor:
        pixels = see(pictures, return_tensors="pt").pixel_values
        return normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def texts(captions: list[str]) -> Tensor:
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)

    return Written(
        library=f"transformers {transformers.__version__}",
        images=images,
        texts=texts,
        logit_scale=model.logit_scale,
        logit_bias=getattr(model, "logit_bias", None),
    )


def _write_clip(subject: Subject, folder: Path) -> list[str]:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    model, tokenizer = subject.model, subject.tokenizer
    if model.logit_bias is not None:
        raise UserError(
            "CLIPModel has no logit_bias, which the sigmoid loss has trained: leave it out, knowingly, with "
            "--without logit_bias"
        )
    # An id that no word has.
    end = tokenizer.vocabulary if tokenizer.end == _LEGACY_END else tokenizer.end
    image, text = clip_image(subject), clip_text(subject, end=end)
    config = CLIPConfig(vision_config=image.config, text_config=text.config, projection_dim=model.image.embed)
    state = {**image.state, **text.state, "logit_scale": model.logit_scale.reshape(())}
    _save(CLIPModel, config, state, folder, part=image_name(subject))
    _processor(CLIPImageProcessor, subject).save_pretrained(folder)
    write_tokenizer(tokenizer, folder, end=end, pad=end)
    if end == tokenizer.end:
        return []
    return [
        f"A text ends with id {end} here and ended with id {tokenizer.end} in training, which a CLIPModel "
        "would take for an old configuration; all other ids are those of training."
    ]


def _write_siglip(subject: Subject, folder: Path) -> list[str]:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    model, tokenizer = subject.model, subject.tokenizer
    image, text = siglip_image(subject), siglip_text(subject)
    config = SiglipConfig(vision_config=image.config, text_config=text.config)
    bias = torch.zeros(1) if model.logit_bias is None else model.logit_bias
    state = {**image.state, **text.state, "logit_scale": model.logit_scale, "logit_bias": bias}
    _save(SiglipModel, config, state, folder, part=image_name(subject))
    _processor(SiglipImageProcessor, subject).save_pretrained(folder)
    write_tokenizer(tokenizer, folder, end=tokenizer.end, pad=text.config["pad_token_id"])
    return [
        "The text tower sees its padding, as it did in training: give every text the full length "
        '(`padding="max_length"`), and no attention mask.'
    ]


def _save(kind: Any, config: Any, state: dict[str, Tensor], folder: Path, *, part: str) -> None:
    """Save a model of these weights, which must be all that it has."""
    with torch.device("meta"):
        model = kind(config)
    for key, wanted in model.state_dict().items():
        if key not in state or state[key].shape != wanted.shape:
            there = f"{tuple(state[key].shape)}" if key in state else "none"
            raise UserError(
                f"this model is no {kind.__name__}: the weight {key} of {tuple(wanted.shape)} is {there} in "
                f"{part if key.startswith('vision') else 'the text tower'}; try --to open_clip"
            )
    # Copies, because the rows of one tensor may have several names.
    model.load_state_dict({key: value.detach().clone() for key, value in state.items()}, assign=True)
    model.save_pretrained(folder)


def _processor(kind: Any, subject: Subject) -> Any:
    """The central square, as it was trained with; SigLIP's own processor squeezes the whole image instead."""
    side, seen = subject.resolution, normalisation_of(subject.model.image)
    return kind(
        size={"shortest_edge": side},
        default_to_square=False,
        do_center_crop=True,
        crop_size={"height": side, "width": side},
        image_mean=seen.mean,
        image_std=seen.std,
    )
