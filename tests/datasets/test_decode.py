import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from datasets.decode import ContentError, decode

RANDOM = np.random.default_rng(0)
ROWS, COLUMNS, COLOURS = np.ogrid[:40, :60, :3]
WAVES = (128 + 100 * np.sin(ROWS / 9 + COLUMNS / 7 + COLOURS)).astype(np.uint8)


def encoded(image, kind, **settings):
    file = BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **settings)
    return file.getvalue()


def pixels(data):
    return decode(data).permute(1, 2, 0).numpy()


def same(a, b):
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0, "quality": 97}])
def test_jpeg_is_what_pillow_decodes(settings):
    data = encoded(WAVES, "JPEG", **settings)
    image = decode(data)
    assert image.shape == (3, 40, 60)
    assert image.dtype == torch.uint8
    assert same(pixels(data), np.asarray(Image.open(BytesIO(data))))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_of_other_colours(mode):
    data = encoded(Image.fromarray(WAVES).convert(mode), "JPEG", quality=95)
    assert same(pixels(data), np.asarray(Image.open(BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_mark_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(WAVES, kind, exif=exif)
    assert same(pixels(data), np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data)))))


def test_lossless_formats_are_exact():
    assert np.array_equal(pixels(encoded(WAVES, "PNG")), WAVES)
    assert np.array_equal(pixels(encoded(WAVES, "WEBP", lossless=True)), WAVES)
    for mode in ("L", "1"):
        image = Image.fromarray(WAVES).convert(mode)
        assert np.array_equal(pixels(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_sixteen_bits_of_grey_keep_their_shades():
    ramp = np.tile(np.linspace(0, 65535, 256).round().astype(np.uint16), (4, 1))
    shown = pixels(encoded(ramp, "PNG"))
    assert np.array_equal(shown, np.tile(np.arange(256, dtype=np.uint8)[:, None], (4, 1, 3)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_shows_white(kind):
    alpha = np.linspace(0, 255, 60).astype(np.uint8)[None, :, None].repeat(40, 0)
    rgba = np.concatenate([WAVES, alpha], axis=2)
    share = alpha / 255
    expected = (WAVES * share + 255 * (1 - share)).round().astype(np.uint8)
    settings = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert same(pixels(encoded(rgba, kind, **settings)), expected)


def test_transparency_of_palettes_and_of_single_colours():
    image = Image.fromarray(np.tile(np.array([[0, 1, 2]], np.uint8), (2, 1))).convert("L")
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2])
    shown = pixels(encoded(palette, "PNG", transparency=bytes([255, 0, 255])))
    assert shown.tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    shown = pixels(encoded(image, "PNG", transparency=1))
    assert shown[:, :, 0].tolist() == [[0, 255, 2]] * 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.fromarray(WAVES), Image.fromarray(255 - WAVES)]
    settings = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    assert getattr(Image.open(BytesIO(data)), "is_animated", False)
    assert np.array_equal(pixels(data), WAVES)


@pytest.mark.parametrize("cut", [1, 2, 10, 0.1, 0.5, 0.9])
def test_cut_jpeg_is_called_truncated(cut):
    data = encoded(WAVES, "JPEG", quality=95)
    keep = len(data) - cut if isinstance(cut, int) else int(len(data) * cut)
    with pytest.raises(ContentError, match="truncated JPEG"):
        decode(data[:keep])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_cut_files_are_found(kind, keep):
    data = encoded(RANDOM.integers(0, 255, (64, 64, 3), dtype=np.uint8), kind)
    with pytest.raises(ContentError, match=kind):
        decode(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    "data",
    [
        b"<html>not found</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        encoded(WAVES, "GIF"),
        encoded(WAVES, "TIFF"),
        b"\0" * 99,
    ],
)
def test_other_formats_are_refused(data):
    with pytest.raises(ContentError, match="not a JPEG, PNG or WebP image"):
        decode(data)


def test_nothing_is_an_empty_image():
    with pytest.raises(ContentError, match="empty image"):
        decode(b"")


def test_large_images_are_refused_before_they_are_decoded():
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 1, 0, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    with pytest.raises(ContentError, match="12000 x 12000 pixels are more than"):
        decode(png)


@pytest.mark.parametrize(
    "inserted", [b"", b"\xff" * 5, b"garbage", b"\xff\xe1\x00\x08\xff\xc0\x00\x11\x08\x00", b"\xff\x01"]
)
def test_size_of_a_jpeg_is_found_where_libjpeg_finds_it(inserted):
    data = bytearray(encoded(WAVES, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 50_000)
    with pytest.raises(ContentError, match="50000 x 60000 pixels are more than"):
        decode(bytes(data[:frame] + inserted + data[frame:]))


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP"]), data=st.data())
def test_damaged_bytes_give_pixels_or_a_fault(kind, data):
    whole = bytearray(encoded(WAVES, kind))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode(bytes(whole))
    except ContentError:
        return
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
