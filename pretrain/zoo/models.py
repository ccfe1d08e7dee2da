"""The kinds of model a run can name, their settings, and how each is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch

from datasets.errors import UserError
from datasets.tokens import HubTokens, OpenClipTokens, Tokenizer
from pretrain.zoo.captioner import Captioner
from pretrain.zoo.definition import define
from pretrain.zoo.dual import Dual
from pretrain.zoo.fusion import Fusion, build_fusion


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every kind of model has."""

    captioner: Captioner.Config = field(default_factory=Captioner.Config)
    """The decoder that writes captions from image tokens; a CoCa of open_clip brings its own."""
    fusion: Fusion.Config = field(default_factory=Fusion.Config)
    """The cross-attention by which the text tower looks at an image to say whether they match."""

    def check(self) -> None:
        """Refuse sizes that no model can have.

        Raises:
            UserError: names the flag.
        """
        _check_sizes("--model.captioner", self.captioner)
        if not 0 < self.captioner.hidden < 1000:
            raise UserError(f"--model.captioner.hidden is {self.captioner.hidden}; it must be above 0")
        for key, least in (("heads", 0), ("every", 1)):
            if (size := getattr(self.fusion, key)) < least:
                raise UserError(f"--model.fusion.{key} is {size}; it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class SmallText:
    """Sizes of a causal text tower built by open_clip."""

    width: int = 64
    """Width of the tokens."""
    layers: int = 2
    """Transformer blocks."""
    heads: int = 2
    """Attention heads; they divide the width."""
    context_length: int = 64
    """The longest caption in tokens; longer ones lose their last words."""


@dataclass(frozen=True, kw_only=True)
class DualConfig(ModelConfig):
    """An image tower of timm or open_clip beside a small text tower, from random weights."""

    image: str = "small"
    """The image tower: small, timm:NAME or open_clip:NAME."""
    text: SmallText = field(default_factory=SmallText)
    """The text tower."""
    embed: int = 128
    """Width of the embeddings that are compared."""

    def check(self) -> None:
        """Refuse sizes that no model can have."""
        super().check()
        _check_sizes("--model.text", self.text)
        if self.embed < 1:
            raise UserError(f"--model.embed is {self.embed}; it must be at least 1")
        if self.text.context_length < 3:
            raise UserError(
                f"--model.text.context-length is {self.text.context_length}; a start, a word and an end are 3"
            )


@dataclass(frozen=True, kw_only=True)
class OpenClipConfig(ModelConfig):
    """A whole dual encoder of open_clip with its own tokenizer, or a CoCa with its own decoder."""

    name: str = "ViT-B-32"
    """A name of open_clip.list_models(); a .json file like those that open_clip's models are made of; a
    directory with an open_clip_config.json; or hf-hub:ORG/NAME."""
    pretrained: str = ""
    """A .safetensors file; a directory with an open_clip_model.safetensors; hf-hub:ORG/NAME; or a tag that
    open_clip knows for this model. Empty: the weights in the directory or repository that is the name, else
    random ones."""
    tokenizer: str = ""
    """A tokenizer of transformers, a directory with a tokenizer.json or a name on the hub, instead of the
    one that the model's configuration asks for."""

    def check(self) -> None:
        """Refuse sizes that no model can have, or that this one does not read."""
        super().check()
        if self.captioner != Captioner.Config() and "multimodal_cfg" in define(self.name).config:
            raise UserError(
                f"open_clip:{self.name} brings its own decoder: leave the --model.captioner flags out"
            )


def _check_sizes(flag: str, sizes: SmallText | Captioner.Config) -> None:
    for key in ("width", "layers", "heads"):
        if getattr(sizes, key) < 1:
            raise UserError(f"{flag}.{key} is {getattr(sizes, key)}; it must be at least 1")
    if sizes.width % sizes.heads:
        raise UserError(f"{flag}.heads is {sizes.heads}; it must divide {flag}.width, which is {sizes.width}")


Temperature = tuple[float, float | None]
"""Initial scale, and bias where the loss has one."""

MODELS: dict[str, type[ModelConfig]] = {"dual": DualConfig, "open_clip": OpenClipConfig}
"""Kind -> settings."""


def model_config_class(kind: str) -> type[ModelConfig]:
    """The settings of a kind of model.

    Raises:
        UserError: no such kind.
    """
    if kind not in MODELS:
        near = get_close_matches(kind, MODELS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown model {kind!r}; {hint}Known: {', '.join(MODELS)}")
    return MODELS[kind]


def model_kind_of(config: ModelConfig) -> str:
    """The kind whose settings these are."""
    return next(kind for kind, owner in MODELS.items() if type(config) is owner)


def model_config(text: str) -> ModelConfig:
    """`dual`, `open_clip` or `open_clip:NAME` as settings.

    Raises:
        UserError: no such kind, or a name where none is expected.
    """
    kind, _, name = text.partition(":")
    owner = model_config_class(kind)
    if not name:
        return owner()
    if owner is OpenClipConfig:
        return OpenClipConfig(name=name)
    raise UserError(f"--model {text}: {kind} takes no name; write --model {kind}")


def own_resolution(config: ModelConfig) -> int | None:
    """The resolution that a model of open_clip was made for; None for a model that takes any."""
    if not isinstance(config, OpenClipConfig):
        return None
    size = define(config.name).config["vision_cfg"].get("image_size", 224)
    return size if isinstance(size, int) else size[0]


def own_tokenizer(config: ModelConfig) -> Tokenizer | None:
    """The tokenizer that a model brings with it; None where one is trained on the data's captions.

    Raises:
        UserError: it has to be fetched from a hub that cannot be reached, or works in a way that we do not.
    """
    if not isinstance(config, OpenClipConfig):
        return None
    definition = define(config.name)
    text: dict[str, Any] = definition.config["text_cfg"]
    context_length = text.get("context_length", 77)
    ways = dict(text.get("tokenizer_kwargs") or {})
    clean, strip_end = ways.pop("clean", None), ways.pop("strip_sep_token", False)
    if ways or text.get("tokenizer_mode"):
        asked = ", ".join(ways) or f"tokenizer_mode {text['tokenizer_mode']}"
        raise UserError(f"open_clip:{config.name} asks for a tokenizer with {asked}, which is not supported")
    source = config.tokenizer or definition.tokenizer(pretrained=config.pretrained)
    if not source:
        return OpenClipTokens(context_length=context_length, clean=clean or "lower")
    clean = clean or "whitespace"
    return HubTokens(source, context_length=context_length, clean=clean, strip_end=strip_end)


def build_model(
    config: ModelConfig,
    *,
    tokenizer: Tokenizer,
    resolution: int,
    temperature: Temperature | None,
    load: bool = True,
) -> Dual:
    """The model, all parts of it, from `torch`'s global random state.

    Args:
        config: kind and settings.
        tokenizer: decides the vocabulary and the longest text.
        resolution: side of the images in pixels; the grid of the position embeddings.
        temperature: what the first contrastive objective starts from, for a model without one of its own.
        load: False leaves out the weights that `config` names, for who has those of a checkpoint.

    Raises:
        UserError: an unknown name, sizes that do not fit, or a tokenizer that the model cannot read.
    """
    if isinstance(config, OpenClipConfig):
        parts = _whole(config, tokenizer=tokenizer, resolution=resolution, load=load)
    else:
        assert isinstance(config, DualConfig)
        parts = _dual(config, tokenizer=tokenizer, resolution=resolution)
    scale, bias = temperature or (1.0, None)
    parts.setdefault("logit_scale", torch.tensor(scale).log())
    if parts.get("logit_bias") is None and bias is not None:
        parts["logit_bias"] = torch.tensor(bias)
    if parts.get("captioner") is None:
        parts["captioner"] = Captioner(
            config.captioner,
            image_width=parts["image"].width,
            vocabulary=tokenizer.vocabulary,
            context_length=tokenizer.context_length,
        )
    # Aside, so that it changes no random number of what is drawn after it.
    with torch.random.fork_rng(devices=[]):
        fusion = build_fusion(config.fusion, text=parts["text"], image_width=parts["image"].width)
    return Dual(**{"logit_bias": None, "fusion": fusion, **parts})


def _dual(config: DualConfig, *, tokenizer: Tokenizer, resolution: int) -> dict[str, Any]:
    from pretrain.zoo.text import build_small_text
    from pretrain.zoo.vision import build_image_tower

    text = config.text
    return {
        "image": build_image_tower(config.image, embed=config.embed, resolution=resolution),
        "text": build_small_text(
            vocabulary=tokenizer.vocabulary,
            width=text.width,
            layers=text.layers,
            heads=text.heads,
            context_length=tokenizer.context_length,
            embed=config.embed,
            end_id=tokenizer.end,
        ),
    }


def _whole(config: OpenClipConfig, *, tokenizer: Tokenizer, resolution: int, load: bool) -> dict[str, Any]:
    from pretrain.zoo.text import check_tokenizer
    from pretrain.zoo.whole import build_whole

    whole = build_whole(
        config.name,
        pretrained=config.pretrained,
        resolution=resolution,
        pad_id=tokenizer.pad,
        load=load,
    )
    check_tokenizer(whole.text, tokenizer, name=f"open_clip:{config.name}")
    names = ("image", "text", "captioner", "logit_scale", "logit_bias")
    return {name: getattr(whole, name) for name in names}
