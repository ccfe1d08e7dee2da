"""Bytes of a JPEG, PNG or WebP file to pixels, or the reason why not.

What is in the file decides, not its name. Damage inside the scan of a JPEG is mentioned by libjpeg on the
console and decoded as well as it can be: the checksums of the index find it, not the decoder. The same holds
for WebP, while PNG brings checksums of its own.

H W pixels.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# (torchvision is untyped)

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from datasets.errors import ContentError

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST_PIXELS = 64 * 2**20  # 192 MiB as RGB
_MOST_OF_WEBP = 32 * 2**20  # libwebp takes 16 bytes a pixel, and 40 bytes of file can claim them all
_MOST_SCANS = 40  # of a JPEG; progressive ones have about ten, and each costs a pass over all pixels
_STRIP = 2**20  # pixels converted at once, to bound what Pillow's copies take

_OTHERS = {
    b"GIF8": "a GIF image", b"BM": "a BMP image", b"II*\0": "a TIFF image", b"MM\0*": "a TIFF image",
    b"%!PS": "PostScript", b"\xc5\xd0\xd3\xc6": "PostScript", b"%PDF": "a PDF document",
    b"<svg": "an SVG drawing", b"<?xml": "an XML document", b"<html": "an HTML page",
    b"<!doctype html": "an HTML page", b"\x1f\x8b": "a gzip file", b"\xff\x0a": "a JPEG XL image",
}  # fmt: skip


def decode(data: bytes) -> Tensor:
    """(3, H, W) uint8 pixels, upright by the file's own orientation mark and without transparency.

    Transparent pixels show white, 16 bits are scaled to 8, an animation gives its first frame, CMYK is
    taken as Adobe writes it (inverted). Colour profiles are not applied: values are those of the file.

    Raises:
        ContentError: the bytes are not a whole image of one of the three formats, or too large to be decoded.
    """
    kind = _kind(data)
    # Whatever a decoder raises on bytes from outside (Pillow: OSError, SyntaxError, ValueError, struct.error,
    # zlib.error, ...) says that it could not read them, and must not stop the run.
    try:
        return _jpeg(data) if kind == "JPEG" else _other(data, kind)
    except (ContentError, ImportError, AssertionError, MemoryError, Warning):
        raise  # not the bytes' doing
    except Exception as error:
        said = str(error).rsplit(", ", 1)[-1]  # torchvision names its own source file first
        if "truncated" in said.lower() or _ends_early(data, kind):
            raise ContentError(f"truncated {kind}", kind="truncated") from error
        if said.startswith("cannot identify"):  # ... an object at some address
            said = "its header cannot be read"
        printable = "".join(character if character.isprintable() else "?" for character in said)
        raise ContentError(f"corrupt {kind}: {printable}", kind="corrupt") from error


def _kind(data: bytes) -> str:
    if data.startswith(b"\xff\xd8"):
        return "JPEG"
    if data.startswith(b"\x89PNG"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if not data:
        raise ContentError("empty image", kind="empty_image")
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    known = (f" but {name}" for prefix, name in _OTHERS.items() if start.startswith(prefix.lower()))
    raise ContentError(f"not a JPEG, PNG or WebP image{next(known, '')}", kind="format")


def _ends_early(data: bytes, kind: str) -> bool:
    """Whether a PNG lacks its last chunk, or a WebP some of the bytes that it announces."""
    if kind == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return kind == "PNG" and b"IEND" not in data


def _jpeg(data: bytes) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    _limit(*_jpeg_size(data))
    scans = data.count(b"\xff\xda")  # within a scan, 0xff stands before 0x00 or another marker only
    if scans > _MOST_SCANS:
        raise ContentError(f"{scans} scans are more than {_MOST_SCANS}", kind="too_large")
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

    if data[12:16] == b"IHDR":  # Pillow would warn of its own limits first
        _limit(int.from_bytes(data[16:20]), int.from_bytes(data[20:24]))
    try:
        image = Image.open(BytesIO(data), formats=(kind,))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ContentError(f"its pixels are more than {_MOST_PIXELS}", kind="too_large") from error
    _limit(*image.size, most=_MOST_OF_WEBP if kind == "WEBP" else _MOST_PIXELS)
    ImageOps.exif_transpose(image, in_place=True)
    depth = data[24] if kind == "PNG" else 8
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and image.mode in ("1", "L") and depth < 8:
        image.info["transparency"] = transparent * 255 // (2**depth - 1)  # as Pillow scales the pixels
    elif isinstance(transparent, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in cast("tuple[int, ...]", transparent))
    width, height = image.size
    rows = max(1, _STRIP // width)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = _rgb(image.crop((0, top, width, bottom)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _rgb(image: Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(H, W, 3) pixels, or (H, W, 1) of grey."""
    from PIL import Image

    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255, which leaves a white image.
        deep = np.asarray(image).astype(np.uint32)
        grey = ((deep * 255 + 32767) // 65535).astype(np.uint8)
        grey[deep == image.info.get("transparency", -1)] = 255
        return grey[:, :, None]
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _limit(width: int, height: int, *, most: int = _MOST_PIXELS) -> None:
    """Refuse an image before it is decoded: a few bytes can claim gigabytes of pixels."""
    if width * height > most:
        raise ContentError(f"{width} x {height} pixels are more than {most}", kind="too_large")
