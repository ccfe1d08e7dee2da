"""A convolutional stem that stands in for a transformer's patch embedding (timm's `embed_layer`).

B images, H W pixels, p patch side, W token width. Small shapes are told apart by their outlines, which
overlapping strided convolutions learn from far fewer samples than one linear map of a whole patch
("Early Convolutions Help Transformers See Better", arXiv 2106.14881). No normalisation between the
convolutions: here it slowed learning down.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_RESIDUAL_GAIN = 0.3
"""Residual convolutions begin small, or a deeper stem learns later than a shallow one."""


class Stem(nn.Module):
    """Halve the image until one token is left of each patch, doubling the width; then refine the tokens.

    The constructor and the attributes are those that timm's VisionTransformer expects of a patch
    embedding, for any image whose sides are multiples of the patch.
    """

    def __init__(
        self,
        img_size: int = 64,
        patch_size: int = 8,
        in_chans: int = 3,
        embed_dim: int = 128,
        *,
        residuals: int = 2,
        bias: bool = True,
        strict_img_size: bool = False,
        dynamic_img_pad: bool = False,
        output_fmt: str = "NHWC",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build for timm.

        Args:
            img_size: side of the image in pixels for which position embeddings are made.
            patch_size: p, a power of two.
            in_chans: channels of the image.
            embed_dim: W.
            residuals: 3 by 3 convolutions that refine the tokens.
            bias: of every convolution.
            strict_img_size: must be False: any multiple of the patch is read.
            dynamic_img_pad: must be False: nothing is padded.
            output_fmt: must be "NHWC".
            device: of the parameters.
            dtype: of the parameters.
        """
        super().__init__()
        halvings = patch_size.bit_length() - 1
        assert patch_size == 1 << halvings > 1, f"{patch_size} is no power of two"
        assert not strict_img_size
        assert not dynamic_img_pad
        assert output_fmt == "NHWC"
        self.patch_size = (patch_size, patch_size)
        self.img_size = (img_size, img_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        widths = [in_chans, *(embed_dim >> i for i in reversed(range(halvings)))]
        self.halve = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1, bias=bias, device=device, dtype=dtype)
            for a, b in pairwise(widths)
        )
        self.refine = nn.ModuleList(
            nn.Conv2d(embed_dim, embed_dim, 3, padding=1, bias=bias, device=device, dtype=dtype)
            for _ in range(residuals)
        )
        self.norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        for name, weight in self.named_parameters():
            if weight.ndim == 4:
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
                with torch.no_grad():
                    weight *= _RESIDUAL_GAIN if name.startswith("refine") else 1
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels to a token, as timm asks."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Tokens of an image of this many pixels, as timm asks."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H/p, W/p, W) tokens of (B, C, H, W) pixels."""
        height, width = x.shape[2:]
        p = self.patch_size[0]
        assert height % p == 0 and width % p == 0, f"{height} by {width} is no multiple of {p}"  # noqa: PT018
        # oneDNN's convolutions are faster on this layout, and what leaves is in timm's order of tokens.
        x = x.contiguous(memory_format=torch.channels_last)
        for i, convolution in enumerate(self.halve):
            x = convolution(x if i == 0 else F.relu(x))
        for convolution in self.refine:
            x = x + F.relu(convolution(x))
        return self.norm(x.permute(0, 2, 3, 1))
