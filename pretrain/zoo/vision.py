"""Image towers around timm's and open_clip's models: uint8 pixels in, `Encoded` out.

B images, H W pixels, P image tokens, C channels of a feature map, D embedding width, W token width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from datasets.errors import UserError
from pretrain.zoo.definition import Pixels, define, refuse_unknown
from pretrain.zoo.stem import Stem
from pretrain.zoo.towers import Encoded, ImageTower

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer


@dataclass(frozen=True, kw_only=True)
class Small:
    """The default image tower, small enough for a laptop."""

    patch: int = 8
    """Side of a patch in pixels."""
    width: int = 128
    """Width of the tokens."""
    depth: int = 1
    """Transformer blocks behind the convolutional stem, where most of the seeing is done."""
    heads: int = 4
    """Attention heads."""
    hidden: float = 2.0
    """Width of the feed-forward layers, in units of the tokens'."""


class PixelTower(ImageTower):
    """An image tower that normalises its pixels and projects what its encoder pooled."""

    mean: Tensor
    std: Tensor

    def __init__(self, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # In units of uint8 pixels, and not saved: they are constants of the model, not weights.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)
        self.project: nn.Module = nn.Identity()

    @abstractmethod
    def encode(self, pixels: Tensor) -> Encoded:
        """Encode (B, 3, H, W) normalised pixels, before the projection."""

    def forward(self, images: Tensor) -> Encoded:
        """Encode (B, 3, H, W) uint8 images."""
        pooled, tokens = self.encode((images.to(self.mean.dtype) - self.mean) / self.std)
        return Encoded(self.project(pooled), tokens)

    @torch.no_grad()
    def measure(self, *, resolution: int, embed: int | None = None) -> None:
        """Set `width` and `embed` by running a black image, and project to `embed` where they differ."""
        training = self.training
        self.eval()
        pooled, tokens = self(torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8))
        self.train(training)
        self.width, self.embed = tokens.shape[-1], pooled.shape[-1]
        if embed is not None and embed != self.embed:
            projection = nn.Linear(self.embed, embed, bias=False)
            nn.init.normal_(projection.weight, std=self.embed**-0.5)  # as CLIP initialises its own
            self.project, self.embed = projection, embed


class TimmTower(PixelTower):
    """A timm model, alone or as the trunk of an open_clip model: its last feature map and its pooling.

    Attributes:
        trunk: the timm model, without classifier.
        head: what open_clip puts behind the trunk; the identity for a timm model alone.
    """

    def __init__(
        self, trunk: nn.Module, *, mean: Sequence[float], std: Sequence[float], head: nn.Module | None = None
    ) -> None:
        super().__init__(mean=mean, std=std)
        self.trunk = cast(Any, trunk)
        self.head = head or nn.Identity()

    def encode(self, pixels: Tensor) -> Encoded:
        """Encode normalised pixels; class and register tokens are left out of the tokens."""
        features = self.trunk.forward_features(pixels)
        return Encoded(self.head(self.trunk.forward_head(features)), self._tokens(features))

    def _tokens(self, features: Tensor) -> Tensor:
        """(B, P, W) of a transformer's tokens, or of a map (B, C, H, W) or (B, H, W, C)."""
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise RuntimeError("it gives no single map of features")
        if features.ndim == 3:
            return features[:, getattr(self.trunk, "num_prefix_tokens", 0) :]
        channels_last = getattr(self.trunk, "output_fmt", "NCHW") == "NHWC"
        return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)


class OpenClipTower(PixelTower):
    """open_clip's own VisionTransformer, whose position embeddings are those of the size it was built for."""

    def __init__(self, visual: VisionTransformer, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(mean=mean, std=std)
        self.visual = visual
        self.visual.output_tokens = True

    def encode(self, pixels: Tensor) -> Encoded:
        """Encode normalised pixels; the tokens are those that open_clip's `output_tokens` gives."""
        height, width = cast(tuple[int, int], self.visual.patch_size)
        if pixels.shape[2] % height or pixels.shape[3] % width:
            raise RuntimeError(f"patches of {height} px do not divide it")  # a convolution would cut the rest
        grid = [pixels.shape[2] // height, pixels.shape[3] // width]
        if grid == list(self.visual.grid_size):
            return Encoded(*self.visual(pixels))
        # As timm's own towers do it. The parameter stays as it is, and with it what the optimizer knows.
        name, positions = "positional_embedding", self.visual.positional_embedding[None]
        resampled = resample_abs_pos_embed(positions, grid, list(self.visual.grid_size))
        return Encoded(*torch.func.functional_call(self.visual, {name: resampled[0]}, (pixels,)))


def wrap_visual(visual: nn.Module, *, name: str, mean: Sequence[float], std: Sequence[float]) -> PixelTower:
    """The image tower around `visual` of an open_clip model.

    Raises:
        UserError: the tower normalises over the batch (open_clip's ResNets, MobileCLIP).
    """
    from open_clip.timm_model import TimmModel

    _refuse_batch_norm(visual, name)
    if isinstance(visual, TimmModel):
        return TimmTower(visual.trunk, head=visual.head, mean=mean, std=std)
    return OpenClipTower(cast("VisionTransformer", visual), mean=mean, std=std)


def build_image_tower(spec: str, *, embed: int, resolution: int) -> PixelTower:
    """Build an image tower with random weights; nothing is downloaded.

    Args:
        spec: `small`, `timm:NAME` or `open_clip:NAME`.
        embed: D, width of the pooled embedding.
        resolution: side of the square images in pixels, and the grid of the position embeddings. Later
            ones may be of other sizes: transformers resample those in the forward, bicubic and antialiased.

    Raises:
        UserError: an unknown spec or name, a tower with BatchNorm, or one that cannot read the resolution.
    """
    kind, _, name = spec.partition(":")
    with fitting(f"image tower {spec}", resolution):
        if spec == "small":
            tower = build_small(Small(), resolution=resolution)
        elif kind == "timm":
            tower = _from_timm(name, resolution=resolution)
        elif kind == "open_clip":
            tower = _from_open_clip(name, embed=embed, resolution=resolution)
        else:
            raise UserError(f"image tower {spec!r} is unknown: write small, timm:NAME or open_clip:NAME")
        tower.measure(resolution=resolution, embed=embed)
    return tower


@contextmanager
def fitting(name: str, resolution: int | None) -> Iterator[None]:
    """Say in a sentence what both libraries say by an assertion or torch by a shape: the size does not fit.

    Raises:
        UserError: instead of an AssertionError or RuntimeError inside.
    """
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name} does not work at {resolution} px: {reason}") from error


def build_small(config: Small, *, resolution: int) -> TimmTower:
    """The default tower: a timm VisionTransformer that resamples its position embeddings."""
    from timm.models.vision_transformer import VisionTransformer

    trunk = VisionTransformer(
        img_size=resolution,
        patch_size=config.patch,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.hidden,
        act_layer=nn.ReLU,
        embed_layer=Stem,
        class_token=False,
        global_pool="map",
        num_classes=0,
        dynamic_img_size=True,
    )
    return TimmTower(trunk, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def _from_timm(name: str, *, resolution: int) -> TimmTower:
    if "." in name:
        bare = name.partition(".")[0]
        raise UserError(
            f"timm:{name} names weights, and this tower starts from random ones: write timm:{bare}"
        )
    import timm

    if not timm.is_model(name):
        refuse_unknown(name, timm.list_models(), library="timm")
    # A classifier of no classes: forward_head then ends with the pooled features.
    trunk = cast(Any, _create_timm(name, resolution=resolution))
    _refuse_batch_norm(trunk, f"timm:{name}")
    return TimmTower(trunk, mean=trunk.pretrained_cfg["mean"], std=trunk.pretrained_cfg["std"])


def _create_timm(name: str, *, resolution: int) -> nn.Module:
    """Create a timm model that can read the resolution, and later ones too where its kind allows it."""
    import timm

    wishes: tuple[dict[str, Any], ...] = (
        {"img_size": resolution, "dynamic_img_size": True},
        {"img_size": resolution},
    )
    for options in wishes:
        try:
            return timm.create_model(name, pretrained=False, num_classes=0, **options)
        except TypeError:  # a constructor that does not know the option: each kind of model has its own
            continue
    return timm.create_model(name, pretrained=False, num_classes=0)


def _from_open_clip(name: str, *, embed: int, resolution: int) -> PixelTower:
    import open_clip

    definition = define(name)
    config = definition.config
    # The whole model with a text tower of nearly no size is open_clip's public way to an image tower.
    whole = open_clip.CustomTextCLIP(
        embed_dim=embed,
        vision_cfg={**config["vision_cfg"], "image_size": resolution, "timm_model_pretrained": False},  # type: ignore[arg-type]
        text_cfg={"layers": 1, "width": 8, "heads": 1, "vocab_size": 1},  # type: ignore[arg-type]
        quick_gelu=config.get("quick_gelu", False),
    )
    fit_trunk(whole.visual, resolution=resolution)
    default = Pixels(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    mean, std = definition.pixels or default
    return wrap_visual(whole.visual, name=f"open_clip:{name}", mean=mean, std=std)


def fit_trunk(visual: nn.Module, *, resolution: int) -> None:
    """Resample the position embeddings of a timm trunk, to which open_clip does not pass a resolution.

    Where its kind allows it, it reads other sizes later, as `dynamic_img_size` makes timm's constructors do.
    """
    from open_clip.timm_model import TimmModel
    from timm.layers.format import Format

    if not isinstance(visual, TimmModel):
        return
    trunk = cast(Any, visual.trunk)
    if hasattr(trunk, "set_input_size"):
        visual.set_input_size(resolution)
    fixed = getattr(trunk, "dynamic_img_size", None) is False
    if fixed and resolution % trunk.patch_embed.patch_size[0] == 0:
        trunk.dynamic_img_size = True
        trunk.patch_embed.strict_img_size = trunk.patch_embed.flatten = False
        trunk.patch_embed.output_fmt = Format.NHWC


def _refuse_batch_norm(model: nn.Module, name: str) -> None:
    # Its statistics are those of one micro-batch on one rank, so the gradient is that of no whole batch.
    for where, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"image tower {name} has BatchNorm (`{where}`), whose result depends on how the batch is cut "
                "over ranks and micro-batches: take a tower with LayerNorm, e.g. timm:vit_small_patch16_224 "
                "or timm:convnext_tiny"
            )
