"""Bytes of a JPEG, PNG or WebP file to pixels, or the reason why not.

H W pixels.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# (torchvision is untyped)

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from torch import Tensor

from datasets.errors import ContentError

_MOST_PIXELS = 64 * 2**20  # 192 MiB as RGB


def decode(data: bytes) -> Tensor:
    """(3, H, W) uint8 pixels, upright by the file's own orientation mark and without transparency.

    Transparent pixels show white, 16-bit grey is scaled to 8 bits, an animation gives its first frame.

    Raises:
        ContentError: the bytes are not a whole image of one of the three formats, or too large to be decoded.
    """
    kind = _kind(data)
    # Whatever a decoder raises on bytes from outside (Pillow: OSError, SyntaxError, ValueError, struct.error,
    # zlib.error, ...) says that it could not read them, and must not stop the run.
    try:
        return _jpeg(data) if kind == "JPEG" else _other(data, kind)
    except (ContentError, ImportError, AssertionError, MemoryError):
        raise  # not the bytes' doing
    except Exception as error:
        said = str(error).rsplit(", ", 1)[-1]  # torchvision names its own source file first
        why = f"truncated {kind}" if "truncated" in said.lower() else f"corrupt {kind}: {said}"
        kind_of = "truncated" if "truncated" in said.lower() else "corrupt"
        raise ContentError(why, kind=kind_of) from error


def _kind(data: bytes) -> str:
    if data.startswith(b"\xff\xd8"):
        return "JPEG"
    if data.startswith(b"\x89PNG"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if not data:
        raise ContentError("empty image", kind="empty_image")
    raise ContentError("not a JPEG, PNG or WebP image", kind="format")


def _jpeg(data: bytes) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    _limit(*_jpeg_size(data))
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image = decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    assert isinstance(image, Tensor)  # a list only for a list
    return image


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height by the frame header, found as libjpeg finds it; (0, 0) if there is none."""
    at = 2
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 8:
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2  # padding, or a marker without content
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7])
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return 0, 0


def _other(data: bytes, kind: str) -> Tensor:
    from PIL import Image, ImageOps

    with Image.open(BytesIO(data), formats=(kind,)) as file:
        _limit(*file.size)
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255, which leaves a white image.
        grey = np.asarray(image).astype(np.uint32) * 255 + 32767
        image = Image.fromarray((grey // 65535).astype(np.uint8))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _limit(width: int, height: int) -> None:
    """Refuse an image before it is decoded: a few bytes can claim gigabytes of pixels."""
    if width * height > _MOST_PIXELS:
        raise ContentError(f"{width} x {height} pixels are more than {_MOST_PIXELS}", kind="too_large")
