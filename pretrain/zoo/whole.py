"""A whole dual encoder of open_clip, taken apart into our towers, with weights from a file or the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from torch import nn

from datasets.errors import UserError
from pretrain.zoo.text import HubText, OpenClipText
from pretrain.zoo.towers import ImageTower
from pretrain.zoo.vision import fit_trunk, fitting, open_clip_config, wrap_visual

if TYPE_CHECKING:
    from open_clip import CustomTextCLIP

CONVERT = (
    'python -c "from open_clip.factory import load_state_dict as load; from safetensors.torch import '
    "save_file; save_file({{k: v.contiguous() for k, v in load('{old}').items()}}, '{new}')\""
)
"""The command that turns a pickled checkpoint of a trusted source into one that we read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The parts of a dual encoder. Each parameter is in exactly one of them."""

    image: ImageTower
    text: OpenClipText | HubText
    logit_scale: nn.Parameter
    """(1,) log of the inverse temperature."""
    logit_bias: nn.Parameter | None
    """(1,) the bias of the sigmoid loss, where the model has one."""
    resolution: int
    """Side in pixels of the images it was built for."""
    mean: tuple[float, ...]
    """Of the pixels in 0..1, for who exports the model; the image tower normalises by itself."""
    std: tuple[float, ...]
    """Likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """Where weights come from, and what must hold for them to mean what they meant in training."""

    path: Path | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    quick_gelu: bool


def build_whole(
    name: str, *, pretrained: str = "", resolution: int | None = None, pad_id: int | None = None
) -> Whole:
    """Build open_clip's model of that name and take it apart.

    Args:
        name: one of `open_clip.list_models()`. A file does not say its activation: the names with -quickgelu
            are for weights that were trained with QuickGELU.
        pretrained: a .safetensors file, or a tag that open_clip knows for this model (downloaded from the
            hub); empty for random weights.
        resolution: side of the images in pixels; None for the model's own. Learned position embeddings are
            resampled once, here.
        pad_id: what the tokenizer pads with. It is needed for towers that see padding (SigLIP) and whose
            tokenizer pads with something else than open_clip's text configuration says.

    Raises:
        UserError: an unknown name or tag, a file that is missing, not safetensors or of another model, the
            hub out of reach, or an image tower with BatchNorm.
    """
    from open_clip import CustomTextCLIP

    config = open_clip_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "hf_model_name" in text:
        _need_text_config(name, text["hf_model_name"])
    weights = _find(name, pretrained)
    on_trunk = "timm_model_name" in vision
    if resolution is not None and not on_trunk:
        vision["image_size"] = resolution  # open_clip's own transformer resamples its positions as it loads
    with fitting(f"open_clip:{name}", resolution):
        # This class has the text tower in one module, also for models that open_clip.CLIP takes apart; of
        # CoCa the decoder is left out.
        model: Any = CustomTextCLIP(
            embed_dim=config["embed_dim"],
            vision_cfg={**vision, "timm_model_pretrained": False},  # type: ignore[arg-type]
            text_cfg={**text, "hf_model_pretrained": False},  # type: ignore[arg-type]
            quick_gelu=config.get("quick_gelu", False) or weights.quick_gelu,
            init_logit_bias=config.get("init_logit_bias"),
        )
    # Before loading: what cannot be wrapped should not be read first.
    image = wrap_visual(model.visual, name=f"open_clip:{name}", mean=weights.mean, std=weights.std)
    if weights.path is not None:
        _load(model, weights.path, name=name)
    side: int = model.visual.image_size[0] if resolution is None else resolution
    with fitting(f"open_clip:{name}", side):
        if on_trunk:
            fit_trunk(model.visual, resolution=side)
        image.measure(resolution=side)
    return Whole(
        image=image,
        text=_wrap_text(model.text, context_length=text.get("context_length", 77), pad_id=pad_id),
        logit_scale=_one(model.logit_scale),
        logit_bias=None if model.logit_bias is None else _one(model.logit_bias),
        resolution=side,
        mean=weights.mean,
        std=weights.std,
    )


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


def _need_text_config(name: str, source: str) -> None:
    """Read the configuration of a text tower of transformers, which open_clip would do without a word."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(source)
    except OSError as error:
        raise UserError(
            f"open_clip:{name} has a text tower whose configuration is read from the hub ({source}), and it "
            "is neither reachable nor in the cache: take a model with a text tower of open_clip's own, e.g. "
            "ViT-B-32"
        ) from error


def _find(name: str, pretrained: str) -> _Weights:
    """The file that `pretrained` means, and how its model saw pixels."""
    import open_clip

    if pretrained and open_clip.is_pretrained_cfg(name, pretrained):
        tag = open_clip.get_pretrained_cfg(name, pretrained)
        path = _download(name, pretrained, tag)
        return _Weights(path=path, mean=tag["mean"], std=tag["std"], quick_gelu=tag.get("quick_gelu", False))
    # A file does not say how its pixels were normalised; where all published weights of a model agree, so
    # (SigLIP) will the file, and otherwise open_clip's own default holds.
    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in _tags(name)]
    seen = {(tuple(tag["mean"]), tuple(tag["std"])) for tag in tags}
    default = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    mean, std = seen.pop() if len(seen) == 1 else default
    path = _local(name, pretrained) if pretrained else None
    return _Weights(path=path, mean=mean, std=std, quick_gelu=False)


def _tags(name: str) -> list[str]:
    import open_clip

    return open_clip.list_pretrained_tags_by_model(name)


def _download(name: str, pretrained: str, tag: dict[str, Any]) -> Path:
    """Fetch a tag's weights from the hub, as safetensors only."""
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME
    from open_clip.pretrained import download_pretrained_from_hf

    repository, _, file = tag["hf_hub"].rpartition("/")
    file = str(PurePosixPath(file).with_suffix(".safetensors")) if file else HF_SAFE_WEIGHTS_NAME
    try:
        return Path(download_pretrained_from_hf(repository, filename=file))
    except FileNotFoundError as error:
        raise UserError(
            f"the weights {pretrained} of open_clip:{name} could not be fetched ({file} of "
            f"{repository} on the hub): check the network, or name a local .safetensors file instead"
        ) from error


def _local(name: str, pretrained: str) -> Path:
    """The local file of that name, if it is one that we read."""
    path = Path(pretrained).expanduser()
    if not path.is_file():
        tags = ", ".join(_tags(name)) or "none"
        raise UserError(f"{pretrained} is neither a file nor a tag of open_clip:{name} (its tags: {tags})")
    if path.suffix != ".safetensors":
        command = CONVERT.format(old=path, new=path.with_suffix(".safetensors"))
        raise UserError(
            f"{path} is a pickle, which is never read here; if you trust its source, convert it: {command}"
        )
    return path


def _load(model: CustomTextCLIP, path: Path, *, name: str) -> None:
    """Load a checkpoint through open_clip, which knows its older formats; every key must find its place."""
    import open_clip
    from safetensors import SafetensorError, safe_open

    where = f"{path} does not fit open_clip:{name}"
    try:
        with safe_open(path, "pt") as file:
            keys = {key.removeprefix("module.") for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    if "logit_scale" not in keys:
        raise UserError(f"{where}: it lacks the key logit_scale")
    if "logit_bias" in keys and model.logit_bias is None:
        raise UserError(f"{where}: it has the key logit_bias, so it belongs to a sigmoid model")
    try:
        result: Any = open_clip.load_checkpoint(model, str(path), strict=False)
    except (AssertionError, RuntimeError) as error:  # shapes: torch's list, or open_clip's own check
        raise UserError(f"{where}: {str(error).strip().splitlines()[-1].strip()}") from error
    strange = [key for key in result.unexpected_keys if not key.startswith("text_decoder.")]  # CoCa's
    for misfits, fault in ((result.missing_keys, "it lacks"), (strange, "the model has no place for")):
        if misfits:
            raise UserError(f"{where}: {fault} {misfits[0]}" + _more(misfits))


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - 1} more keys" if len(keys) > 1 else ""
