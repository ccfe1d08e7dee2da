"""Images as they come, for tests: 27 kinds of file, each with the pixels it shows or why it is refused.

What is expected is computed from the picture that was written, never by decoding. H W pixels.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (Pillow is partly untyped)

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from datasets.errors import Kind

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_ROWS, _COLUMNS, _COLOURS = np.ogrid[:40, :60, :3]
WAVES: Pixels = (128 + 100 * np.sin(_ROWS / 9 + _COLUMNS / 7 + _COLOURS)).astype(np.uint8)
"""(40, 60, 3): a smooth picture without any symmetry."""
_GREY = WAVES[:, :, :1].repeat(3, axis=2)
_ALPHA: Pixels = np.linspace(0, 255, 60).astype(np.uint8)[None, :, None].repeat(40, axis=0)
_LOSSY = 20  # what quality 95 and colours of half the resolution may change of a smooth picture
_ARITHMETIC = bytes.fromhex(  # Pillow cannot write one: 8 x 8 pixels, column c shows 32 c
    "ffd8ffe000104a46494600010100000100010000ffdb00430001010101010101010101010101010102010101010102010101"
    "020202020202020202030304030303030302020304030304040404040203050504040504040404ffc9000b08000800080101"
    "1100ffcc000600101005ffda0008010100003f00ff00c5dc534ec7b866369aec80ffd9"
)


@dataclass(frozen=True, slots=True)
class File:
    """A file and what is right to make of it."""

    name: str
    data: bytes
    shows: Pixels | None = None
    """(H, W, 3), or None where the file must be refused."""
    within: int = 0
    """By how much a pixel may differ from `shows`."""
    fault: Kind | None = None
    """Why it is refused. Beside `shows`: damage that the format cannot tell from content, so that any pixels
    of that shape, or this fault, are right.
    """


def encoded(image: Pixels | Image.Image, kind: str, **settings: Any) -> bytes:
    """A picture as the bytes of a file."""
    file = BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **settings)
    return file.getvalue()


def png(lines: bytes, size: tuple[int, int], *, depth: int, colour: int, **more: Any) -> bytes:
    """A PNG by the specification.

    Args:
        lines: its rows, each led by the number of its filter.
        size: width and height that it claims.
        depth: bits of a channel.
        colour: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA.
        more: `extra`, chunks before the pixels; `interlaced`, 0 or 1.
    """
    head = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, more.get("interlaced", 0))
    chunks = _chunk(b"IHDR", head) + more.get("extra", b"") + _chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + chunks + _chunk(b"IEND", b"")


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _lines(values: np.ndarray[Any, Any]) -> bytes:
    """Rows of whole bytes, in the byte order of PNG, without a filter."""
    return b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)


def _packed(values: np.ndarray[Any, Any], depth: int) -> bytes:
    bits = (values[:, :, None] >> np.arange(depth)[::-1]) & 1
    return _lines(np.packbits(bits.reshape(len(values), -1).astype(np.uint8), axis=1))


def _on_white(image: Pixels, alpha: Pixels) -> Pixels:
    return np.rint(255 + (image - 255.0) * (alpha / 255)).astype(np.uint8)


def _eight(deep: np.ndarray[Any, Any]) -> Pixels:
    return np.rint(deep / 257).astype(np.uint8)


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def _jpeg_baseline() -> Iterator[File]:
    yield File("half the colours", encoded(WAVES, "JPEG", quality=95), WAVES, _LOSSY)
    yield File("all colours", encoded(WAVES, "JPEG", quality=95, subsampling=0), WAVES, _LOSSY)


def _jpeg_progressive() -> Iterator[File]:
    yield File("progressive", encoded(WAVES, "JPEG", quality=95, progressive=True), WAVES, _LOSSY)


def _jpeg_grey() -> Iterator[File]:
    yield File("grey", encoded(WAVES[:, :, 0], "JPEG", quality=95), _GREY, _LOSSY)


def _inks() -> tuple[Pixels, Pixels, Pixels]:
    """(H, W, 3) cyan, magenta, yellow; (H, W, 1) black; and the (H, W, 3) colours they print."""
    black = _ALPHA // 2
    return WAVES, black, np.rint((255 - WAVES) / 255 * (255.0 - black)).astype(np.uint8)


def _jpeg_cmyk() -> Iterator[File]:
    inks, black, shows = _inks()
    image = Image.fromarray(np.concatenate([inks, black], axis=2), "CMYK")
    yield File("CMYK", encoded(image, "JPEG", quality=95), shows, _LOSSY)


def _jpeg_ycck() -> Iterator[File]:
    inks, black, shows = _inks()
    luma = 255 - np.asarray(Image.fromarray(inks).convert("YCbCr"))  # Pillow turns the planes of CMYK over
    data = encoded(Image.fromarray(np.concatenate([luma, black], axis=2), "CMYK"), "JPEG", quality=95)
    transform = data.index(b"Adobe") + 11
    yield File("YCCK", data[:transform] + b"\2" + data[transform + 1 :], shows, _LOSSY)


def _orientation() -> Iterator[File]:
    seen = [
        WAVES, WAVES[:, ::-1], WAVES[::-1, ::-1], WAVES[::-1],
        WAVES.transpose(1, 0, 2), np.rot90(WAVES, -1),
        WAVES[::-1, ::-1].transpose(1, 0, 2), np.rot90(WAVES),
    ]  # fmt: skip
    for mark, shows in enumerate(seen, start=1):
        exif = Image.Exif()
        exif[0x0112] = mark
        yield File(f"JPEG {mark}", encoded(WAVES, "JPEG", quality=95, exif=exif), shows, _LOSSY)
        yield File(f"PNG {mark}", encoded(WAVES, "PNG", exif=exif), shows)


def _jpeg_cut() -> Iterator[File]:
    data = encoded(WAVES, "JPEG", quality=95)
    for name, keep in {"2 bytes": -2, "10 bytes": -10, "half": len(data) // 2, "all but 20": 20}.items():
        yield File(f"cut by {name}", data[:keep], fault="truncated")


def _jpeg_damaged() -> Iterator[File]:
    data = bytearray(encoded(WAVES, "JPEG", quality=95))
    random = np.random.default_rng(0)
    for place in random.integers(data.index(b"\xff\xda") + 20, len(data) - 2, 200):
        data[place] = random.integers(255)
    yield File("200 bytes of its scan", bytes(data), WAVES, fault="corrupt")


def _jpeg_trailing() -> Iterator[File]:
    yield File("garbage behind", encoded(WAVES, "JPEG", quality=95) + b"garbage" * 99, WAVES, _LOSSY)


def _jpeg_rare() -> Iterator[File]:
    ramp: Pixels = np.tile(np.arange(0, 256, 32, dtype=np.uint8)[:, None], (8, 1, 3))
    yield File("arithmetic coding", _ARITHMETIC, ramp, _LOSSY)
    data = bytearray(encoded(WAVES, "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    yield File("12 bits", bytes(data), fault="corrupt")


def _jpeg_bomb() -> Iterator[File]:
    data = bytearray(encoded(WAVES, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 50_000)
    yield File("claims 3,000 Mpx", bytes(data), fault="too_large")
    image = encoded(np.zeros((4096, 4096), np.uint8), "JPEG", progressive=True)
    last = image.rindex(b"\xff\xda")
    yield File("1,000 scans", image[:-2] + image[last:-2] * 1000 + image[-2:], fault="too_large")


def _few_bits() -> Iterator[File]:
    for depth in (1, 2, 4):
        values = (_ROWS[:, :, 0] + _COLUMNS[:, :, 0]) % 2**depth
        grey = (values * 255 // (2**depth - 1)).astype(np.uint8)[:, :, None].repeat(3, axis=2)
        yield File(f"grey of {depth}", png(_packed(values, depth), (60, 40), depth=depth, colour=0), grey)
        colours = WAVES[0, : 2**depth]
        data = png(
            _packed(values, depth), (60, 40), depth=depth, colour=3, extra=_chunk(b"PLTE", colours.tobytes())
        )
        yield File(f"palette of {depth}", data, colours[values])


def _palette_alpha() -> Iterator[File]:
    values, alpha = (_ROWS + _COLUMNS)[:, :, 0] % 60, _ALPHA[0]
    chunks = _chunk(b"PLTE", WAVES[0].tobytes()) + _chunk(b"tRNS", alpha.tobytes())
    data = png(_lines(values.astype(np.uint8)), (60, 40), depth=8, colour=3, extra=chunks)
    yield File("palette with transparency", data, _on_white(WAVES[0], alpha)[values], 1)


def _alpha() -> Iterator[File]:
    for name, image, kind in (
        ("RGBA", WAVES, "PNG"),
        ("LA", WAVES[:, :, :1], "PNG"),
        ("RGBA", WAVES, "WEBP"),
    ):
        settings = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        data = encoded(np.concatenate([image, _ALPHA], axis=2), kind, **settings)
        yield File(f"{name} {kind}", data, _on_white(image, _ALPHA).repeat(3 // image.shape[2], axis=2), 1)


def _one_colour_transparent() -> Iterator[File]:
    two = (_ROWS[:, :, 0] + _COLUMNS[:, :, 0]) % 4
    grey = np.where(two == 1, 255, two * 85).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    key = _chunk(b"tRNS", struct.pack(">H", 1))
    yield File("grey of 2 bits", png(_packed(two, 2), (60, 40), depth=2, colour=0, extra=key), grey)
    for depth, scale in ((8, 1), (16, 257)):
        image = WAVES.astype(np.uint8 if depth == 8 else np.uint16) * scale
        hidden = (image == image[3, 5]).all(axis=2, keepdims=True)
        key = _chunk(b"tRNS", image[3, 5].astype(">u2").tobytes())
        data = png(_lines(image), (60, 40), depth=depth, colour=2, extra=key)
        yield File(f"RGB of {depth} bits", data, np.where(hidden, 255, WAVES).astype(np.uint8))
        key = _chunk(b"tRNS", struct.pack(">H", image[3, 5, 0]))
        data = png(_lines(image[:, :, 0]), (60, 40), depth=depth, colour=0, extra=key)
        shows = np.where(_GREY[3, 5] == _GREY, 255, _GREY).astype(np.uint8)
        yield File(f"grey of {depth} bits", data, shows)


def _deep_grey() -> Iterator[File]:
    deep = WAVES[:, :, 0].astype(np.uint16) * 256 + 77
    shows = _eight(deep)[:, :, None].repeat(3, axis=2)
    yield File("16 bits of grey", png(_lines(deep), (60, 40), depth=16, colour=0), shows)


def _deep_colour() -> Iterator[File]:
    deep, alpha = WAVES.astype(np.uint16) * 256 + 77, _ALPHA.astype(np.uint16) * 257
    yield File("RGB", png(_lines(deep), (60, 40), depth=16, colour=2), _eight(deep), 1)
    for name, image, colour in (("RGBA", deep, 6), ("LA", deep[:, :, :1], 4)):
        lines = _lines(np.concatenate([image, alpha], axis=2))
        shows = _on_white(_eight(image), _ALPHA).repeat(3 // image.shape[2], axis=2)
        yield File(name, png(lines, (60, 40), depth=16, colour=colour), shows, 2)


def _interlaced() -> Iterator[File]:
    passes = ("0088", "0488", "4084", "0244", "2042", "0122", "1021")  # top, left, step down, step right
    lines = b""
    for top, left, down, right in (map(int, each) for each in passes):
        lines += _lines(WAVES[top::down, left::right])
    yield File("Adam7", png(lines, (60, 40), depth=8, colour=2, interlaced=1), WAVES)


def _text_bomb() -> Iterator[File]:
    body = b"Comment\0\0" + zlib.compress(bytes(20_000_000))
    data = png(_lines(WAVES), (60, 40), depth=8, colour=2, extra=_chunk(b"zTXt", body))
    yield File("20 MB of text in 20 kB", data, fault="corrupt")


def _pixel_bomb() -> Iterator[File]:
    for side in (12_000, 20_000):
        lines = bytes((1 + side // 8) * side)
        yield File(f"{side} x {side}", png(lines, (side, side), depth=1, colour=0), fault="too_large")
    flat = bytearray(encoded(np.full((16, 16, 3), 9, np.uint8), "WEBP", lossless=True))
    flat[21:25] = struct.pack("<I", 8191 | 8191 << 14 | int(flat[24]) >> 4 << 28)
    yield File("40 bytes of WebP", bytes(flat), fault="too_large")


def _png_damaged() -> Iterator[File]:
    data = encoded(WAVES, "PNG")
    pixels, length = data.index(b"IDAT"), struct.unpack(">I", data[data.index(b"IDAT") - 4 :][:4])[0]
    yield File("a byte of its pixels", _flipped(data, pixels + length // 2), fault="corrupt")
    yield File("a byte of its header", _flipped(data, 17), fault="too_large")
    yield File("checksum of its header", _flipped(data, 30), fault="corrupt")
    yield File("checksum alone of its pixels", _flipped(data, pixels + 4 + length), WAVES)
    yield File("cut to half", data[: len(data) // 2], fault="truncated")
    yield File("cut inside its header", data[:20], fault="truncated")
    yield File("without its last chunk", data[:-12], WAVES)


def _webp() -> Iterator[File]:
    yield File("lossy", encoded(WAVES, "WEBP", quality=95), WAVES, _LOSSY)
    yield File("lossless", encoded(WAVES, "WEBP", lossless=True), WAVES)


def _animated() -> Iterator[File]:
    after = [Image.fromarray(255 - WAVES)]
    yield File("PNG", encoded(WAVES, "PNG", save_all=True, append_images=after), WAVES)
    yield File("WebP", encoded(WAVES, "WEBP", save_all=True, append_images=after, lossless=True), WAVES)


def _webp_cut() -> Iterator[File]:
    data = encoded(WAVES, "WEBP", lossless=True)
    for keep in (16, len(data) // 2, len(data) - 10):
        yield File(f"{keep} bytes", data[:keep], fault="truncated")


def _profile() -> Iterator[File]:
    made: Any = ImageCms.createProfile("XYZ")
    profile = ImageCms.ImageCmsProfile(made).tobytes()
    yield File("PNG", encoded(WAVES, "PNG", icc_profile=profile), WAVES)
    yield File("JPEG", encoded(WAVES, "JPEG", quality=95, icc_profile=profile), WAVES, _LOSSY)


def _shapes() -> Iterator[File]:
    for kind, longest in {"JPEG": 20_000, "PNG": 20_000, "WEBP": 16_000}.items():
        settings = {"lossless": True} if kind == "WEBP" else {"quality": 95}
        within = _LOSSY if kind == "JPEG" else 0
        yield File(f"one pixel {kind}", encoded(WAVES[:1, :1], kind, **settings), WAVES[:1, :1], within)
        ramp = (np.arange(longest) // 100).astype(np.uint8)[:, None, None].repeat(3, axis=2)
        yield File(f"1 wide {kind}", encoded(ramp, kind, **settings), ramp, within)
        wide = ramp.transpose(1, 0, 2)
        yield File(f"1 high {kind}", encoded(wide, kind, **settings), wide, within)


def _not_ours() -> Iterator[File]:
    yield File("empty", b"", fault="empty_image")
    for kind in ("GIF", "BMP", "TIFF", "EPS", "AVIF", "PPM"):
        yield File(kind, encoded(WAVES, kind), fault="format")
    frames = [Image.fromarray(255 - WAVES)]
    yield File("animated GIF", encoded(WAVES, "GIF", save_all=True, append_images=frames), fault="format")
    texts = {
        "PostScript": "%!PS-Adobe\n(owned) (w) file", "SVG": '<svg xmlns="http://www.w3.org/2000/svg"/>',
        "HTML": "\n<!DOCTYPE html><title>404 Not Found</title>", "JSON": '{"error": 404}', "zeros": "\0" * 99,
    }  # fmt: skip
    for name, text in texts.items():
        yield File(name, text.encode(), fault="format")


KINDS_OF_FILE: dict[str, Callable[[], Iterator[File]]] = {
    "JPEG": _jpeg_baseline,
    "progressive JPEG": _jpeg_progressive,
    "grey JPEG": _jpeg_grey,
    "CMYK JPEG": _jpeg_cmyk,
    "YCCK JPEG": _jpeg_ycck,
    "orientation mark": _orientation,
    "JPEG that is cut": _jpeg_cut,
    "JPEG with a damaged scan": _jpeg_damaged,
    "JPEG with garbage behind": _jpeg_trailing,
    "JPEG of rare coding": _jpeg_rare,
    "JPEG bomb": _jpeg_bomb,
    "1, 2 and 4 bits": _few_bits,
    "palette with transparency": _palette_alpha,
    "hidden colours": _alpha,
    "one transparent colour": _one_colour_transparent,
    "16 bits of grey": _deep_grey,
    "16 bits of colour": _deep_colour,
    "interlaced PNG": _interlaced,
    "text bomb": _text_bomb,
    "pixel bomb": _pixel_bomb,
    "damaged PNG": _png_damaged,
    "WebP": _webp,
    "animation": _animated,
    "WebP that is cut": _webp_cut,
    "colour profile": _profile,
    "extreme shape": _shapes,
    "no such format": _not_ours,
}
"""The 27 kinds by name; calling one makes its files."""
