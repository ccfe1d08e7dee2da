"""A whole model of open_clip, taken apart into our towers, and put together again for who exports it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from datasets import hub
from datasets.errors import UserError
from pretrain.zoo.coca import CoCaDecoder, init_projection, wrap_decoder
from pretrain.zoo.definition import Definition, Pixels, define
from pretrain.zoo.dual import Dual
from pretrain.zoo.text import HubText, OpenClipText
from pretrain.zoo.towers import ImageTower
from pretrain.zoo.vision import OpenClipTower, TimmTower, fit_trunk, fitting, wrap_visual
from pretrain.zoo.weights import Weights, find_weights, load_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The parts of a dual encoder. Each parameter is in exactly one of them."""

    image: ImageTower
    text: OpenClipText | HubText
    captioner: CoCaDecoder | None
    """The decoder of a CoCa."""
    logit_scale: nn.Parameter
    """(1,) log of the inverse temperature."""
    logit_bias: nn.Parameter | None
    """(1,) the bias of the sigmoid loss, where the model has one."""
    resolution: int
    """Side in pixels of the images it was built for."""
    pixels: Pixels
    """For who exports the model; the image tower normalises by itself."""


def build_whole(
    name: str,
    *,
    pretrained: str = "",
    resolution: int | None = None,
    pad_id: int | None = None,
    load: bool = True,
) -> Whole:
    """Build open_clip's model of that name and take it apart.

    Args:
        name: as of `define`: a name of open_clip's, a path, or one of the hub. A file of weights does not
            say its activation: the names with -quickgelu are for weights trained with QuickGELU.
        pretrained: as of `find_weights`: a path, one of the hub, or a tag; empty for random weights, or for
            those that lie beside the configuration.
        resolution: side of the images in pixels; None for the model's own. Learned position embeddings are
            resampled once, here.
        pad_id: what the tokenizer pads with. It is needed for towers that see padding (SigLIP) and whose
            tokenizer pads with something else than open_clip's text configuration says.
        load: False leaves the weights random and fetches none, for who has others.

    Raises:
        UserError: an unknown name or tag, a file that is missing, not safetensors or of another model, the
            hub out of reach, an image tower with BatchNorm, or a CoCa that sees what it should predict.
    """
    definition = define(name)
    weights = find_weights(definition, pretrained)
    path = weights.path() if load and weights.path is not None else None
    model = _construct(definition, weights, resolution)
    title = f"open_clip:{name}"
    # Before loading: what cannot be wrapped should not be read first.
    image = wrap_visual(model.visual, name=title, mean=weights.pixels.mean, std=weights.pixels.std)
    if path is not None:
        load_weights(model, path, name=title)
    side: int = model.visual.image_size[0] if resolution is None else resolution
    with fitting(title, side):
        fit_trunk(model.visual, resolution=side)
        image.measure(resolution=side)
    context_length = definition.config["text_cfg"].get("context_length", 77)
    text = _wrap_text(model.text, context_length=context_length, pad_id=pad_id)
    decoder = getattr(model, "text_decoder", None)
    return Whole(
        image=image,
        text=text,
        captioner=None if decoder is None else wrap_decoder(decoder, image=image, text=text, name=title),
        logit_scale=_one(model.logit_scale),
        logit_bias=None if model.logit_bias is None else _one(model.logit_bias),
        resolution=side,
        pixels=weights.pixels,
    )


def _construct(definition: Definition, weights: Weights, resolution: int | None) -> Any:
    """open_clip's module of random weights, of a class that has the text tower in one module."""
    from open_clip import CoCa, CustomTextCLIP

    settings = {key: value for key, value in definition.config.items() if key != "custom_text"}
    vision, text = dict(settings["vision_cfg"]), dict(settings["text_cfg"])
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    elif resolution is not None:
        vision["image_size"] = resolution  # open_clip's own transformer resamples its positions as it loads
    if text.get("hf_model_name"):
        text |= {"hf_model_name": str(_text_folder(definition)), "hf_model_pretrained": False}
    settings |= {"vision_cfg": vision, "text_cfg": text}
    settings["quick_gelu"] = settings.get("quick_gelu", False) or weights.quick_gelu
    with fitting(f"open_clip:{definition.name}", resolution):
        try:
            model = (CoCa if "multimodal_cfg" in settings else CustomTextCLIP)(**settings)
        except TypeError as error:  # of its dataclasses: a key that they do not have
            raise UserError(f"open_clip:{definition.name}: {error}") from error
    if isinstance(model, CoCa):
        init_projection(model.text_decoder.text_projection)
    return model


def _text_folder(definition: Definition) -> Path:
    """Where the configuration of a text tower of transformers lies."""
    named = definition.config["text_cfg"]["hf_model_name"]
    folder = Path(named).expanduser()
    if folder.is_dir():
        return folder
    instead = (
        "take a model with a text tower of open_clip's own, such as ViT-B-32, or a .json configuration whose "
        "hf_model_name is a local directory"
    )
    return hub.fetch(named, "config.json", instead=instead).parent


def _one(scalar: nn.Parameter) -> nn.Parameter:
    """(1,) from open_clip's (): sharding refuses parameters without a dimension."""
    return nn.Parameter(scalar.detach().reshape(1))


def _wrap_text(text: nn.Module, *, context_length: int, pad_id: int | None) -> OpenClipText | HubText:
    from open_clip.hf_model import HFTextEncoder
    from open_clip.transformer import TextTransformer

    if isinstance(text, HFTextEncoder):
        return HubText(text, context_length=context_length)
    assert isinstance(text, TextTransformer), type(text)
    return OpenClipText(text, pad_id=pad_id)


def open_clip_state(model: Dual, *, custom_text: bool = True) -> dict[str, Tensor]:
    """The weights under the names of open_clip's own module, which `open_clip.create_model` can load.

    An image tower of timm stands as the trunk of open_clip's TimmModel, its projection as `timm_proj`
    "linear" without bias. The decoder of a CoCa is there if it was trained; a captioner of ours has no place.

    Args:
        model: a dual encoder, with its text tower.
        custom_text: the names of `CustomTextCLIP` and `CoCa`, whose text tower is one module, and not those
            of `CLIP`, to which models without `custom_text` in their configuration belong. A file with the
            names of `CLIP` can be loaded into both.

    Raises:
        AssertionError: a part that open_clip has no name for.
    """
    text, captioner = model.text, model.captioner
    assert isinstance(text, OpenClipText | HubText), type(text)
    state = _image_state(model.image)
    tower = text.tower if isinstance(text, OpenClipText) else text.encoder
    state |= _under("text." if custom_text else "", tower)
    if isinstance(captioner, CoCaDecoder):
        state |= _under("text_decoder.", captioner.decoder)
        state["text_decoder.text_projection"] = captioner.head.weight
    state["logit_scale"] = model.logit_scale.reshape(())
    if model.logit_bias is not None:
        state["logit_bias"] = model.logit_bias.reshape(())
    return {key: value.detach() for key, value in state.items()}


def _image_state(image: ImageTower) -> dict[str, Tensor]:
    assert isinstance(image, OpenClipTower | TimmTower), type(image)
    if isinstance(image, OpenClipTower):
        assert not list(image.project.parameters()), "open_clip's tower projects by itself"
        return _under("visual.", image.visual)
    return {
        **_under("visual.trunk.", image.trunk),
        **_under("visual.head.", image.head),
        **_under("visual.head.proj.", image.project),
    }


def _under(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in module.state_dict().items()}
