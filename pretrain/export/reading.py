"""An export as a model that can be judged: of open_clip, or a CLIPModel or SiglipModel of transformers.

B images, N texts, T tokens, W token width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from datasets.errors import UserError
from datasets.tokens import HubTokens, Tokenizer
from pretrain.zoo.coca import CoCaDecoder
from pretrain.zoo.definition import CONFIG, read_pixels
from pretrain.zoo.dual import Dual
from pretrain.zoo.models import OpenClipConfig, build_model, own_resolution, own_tokenizer
from pretrain.zoo.towers import Encoded, TextTower
from pretrain.zoo.vision import PixelTower

_KINDS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
"""`model_type` in a config.json of transformers -> class."""
_AGAIN = "export the run again, or copy the directory again from where it is whole"


class Export(NamedTuple):
    """What is judged."""

    model: Dual
    tokenizer: Tokenizer
    resolution: int
    """Side of its images in pixels."""


def load_export(path: Path) -> Export:
    """Load a model of open_clip or transformers from a directory. No pickle is read, nothing is fetched.

    Raises:
        UserError: it is of another kind, or damaged.
    """
    return _of_open_clip(path) if (path / CONFIG).is_file() else _of_transformers(path)


def _of_open_clip(path: Path) -> Export:
    config = OpenClipConfig(name=str(path))
    tokenizer, resolution = own_tokenizer(config), own_resolution(config)
    assert tokenizer is not None
    assert resolution is not None
    model = build_model(config, tokenizer=tokenizer, resolution=resolution, temperature=None)
    if not isinstance(model.captioner, CoCaDecoder):
        model.captioner = None  # built beside any dual encoder, of random weights
    model.fusion = None  # of random weights too: no library holds one
    return Export(model.eval(), tokenizer, resolution)


def _of_transformers(path: Path) -> Export:
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    kind = _kind(path / "config.json")
    _refuse_broken(path)
    try:
        # Where it is not asked, transformers fills the place of a weight that is missing with random numbers.
        model: Any
        model, loading = getattr(transformers, _KINDS[kind]).from_pretrained(
            path, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        see: Any = transformers.AutoImageProcessor.from_pretrained(path, local_files_only=True)
    # A value of config.json that is of another type; weights of other shapes.
    except (OSError, ValueError, StrictDataclassError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read by transformers: {reason}") from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{path} holds no weights for {missing[0]} ({len(missing)} such in all): {_AGAIN}")
    side: int = model.config.vision_config.image_size
    pixels = read_pixels(path / "preprocessor_config.json", mean=see.image_mean, std=see.image_std)
    image = HubImage(model, mean=pixels.mean, std=pixels.std)
    image.measure(resolution=side)
    text = HubCaptions(model)
    bias = getattr(model, "logit_bias", None)
    dual = Dual(
        image=image,
        text=text,
        captioner=None,
        fusion=None,
        logit_scale=model.logit_scale.detach(),
        logit_bias=None if bias is None else bias.detach(),
    )
    tokenizer = PlainTokens(str(path), context_length=text.context_length)
    return Export(dual.eval(), tokenizer, side)


def _kind(file: Path) -> str:
    """The `model_type` that a config.json names."""
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): {_AGAIN}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in tuple(_KINDS):
        raise UserError(
            f"{file.parent} holds a model of type {kind!r}, and only {' and '.join(_KINDS)} can be read"
        )
    return kind


def _refuse_broken(path: Path) -> None:
    """Refuse a directory with weights that end early, or are none."""
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{file} is not a readable safetensors file ({error}): {_AGAIN}") from error


class PlainTokens(HubTokens):
    """A tokenizer as transformers applies it: nothing is done to a text that its own files do not say."""

    def __init__(self, source: str, *, context_length: int) -> None:
        super().__init__(source, context_length=context_length)
        self._clean = str  # the same text


class HubImage(PixelTower):
    """The image tower of a CLIPModel or SiglipModel."""

    def __init__(self, model: Any, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(mean=mean, std=std)
        self.tower = model.vision_model
        self.has_class = hasattr(model, "visual_projection")
        if self.has_class:  # SiglipModel's tower ends with its own head
            self.project = model.visual_projection

    def encode(self, pixels: Tensor) -> Encoded:
        """Encode normalised pixels; CLIP's class token is left out of the tokens."""
        seen = self.tower(pixel_values=pixels)
        tokens = seen.last_hidden_state
        return Encoded(
            seen.pooler_output, self.tower.post_layernorm(tokens[:, 1:]) if self.has_class else tokens
        )


class HubCaptions(TextTower):
    """The text tower of a CLIPModel or SiglipModel.

    CLIP's is causal and read at its end token, so nothing behind a text is seen. SigLIP's is read at its last
    column and sees the padding.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config.text_config
        self.tower = model.text_model
        self.project: nn.Module = getattr(model, "text_projection", nn.Identity())
        self.trims = isinstance(self.project, nn.Linear)
        self.pad_id: int = config.pad_token_id
        self.width: int = config.hidden_size
        self.embed: int = model.config.projection_dim if self.trims else config.projection_size
        self.context_length: int = config.max_position_embeddings

    def forward(self, tokens: Tensor, length: Tensor) -> Encoded:
        """Encode (N, T) token ids, of which the first `length` (N,) of each row are text."""
        T = tokens.shape[1]
        columns = T if self.trims else self.context_length
        places = torch.arange(columns, device=tokens.device)
        text = F.pad(tokens, (0, columns - T)).masked_fill(places >= length[:, None], self.pad_id)
        read = self.tower(input_ids=text)
        return Encoded(self.project(read.pooler_output), read.last_hidden_state[:, :T])
