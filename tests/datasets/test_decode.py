import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.corpus import KINDS_OF_FILE, WAVES, encoded
from datasets.decode import decode
from datasets.errors import ContentError

ROOT = Path(__file__).resolve().parents[2]


def read(data):
    try:
        return decode(data), None, ""
    except ContentError as error:
        return None, error.kind, str(error)


def test_there_are_27_kinds():
    assert len(KINDS_OF_FILE) == 27


@pytest.mark.parametrize("kind", KINDS_OF_FILE)
def test_right_pixels_or_a_named_refusal(kind):
    for file in KINDS_OF_FILE[kind]():
        image, fault, reason = read(file.data)
        if image is None:
            assert fault == file.fault, (file.name, reason)
            assert reason.isprintable(), file.name
            assert " at 0x" not in reason, f"{file.name}: the reason is not the same twice"
            continue
        assert file.shows is not None, f"{file.name} must be refused"
        assert image.dtype == torch.uint8
        assert image.shape == (3, *file.shows.shape[:2]), file.name
        if file.fault is None:
            off = np.abs(image.permute(1, 2, 0).numpy().astype(int) - file.shows).max()
            assert off <= file.within, file.name


APART = [b"\xff" * 5, b"garbage", b"\xff\xe1\x00\x08\xff\xc0\x00\x11\x08\x00", b"\xff\x01"]


@pytest.mark.parametrize("inserted", APART)
def test_size_of_a_jpeg_is_found_where_libjpeg_finds_it(inserted):
    bomb = next(KINDS_OF_FILE["JPEG bomb"]()).data
    frame = bomb.index(b"\xff\xc0")
    with pytest.raises(ContentError, match="50000 x 60000 pixels are more than"):
        decode(bomb[:frame] + inserted + bomb[frame:])


def test_images_wider_than_a_strip_are_whole():
    """Rows are converted a strip at a time: 2 x 2**20 pixels are several, the last one shorter."""
    image = np.random.default_rng(0).integers(0, 256, (2100, 1000, 4), dtype=np.uint8)
    alpha = image[:, :, 3:] / 255
    expected = np.rint(image[:, :, :3] * alpha + 255 * (1 - alpha))
    shown = decode(encoded(image, "PNG", compress_level=0)).permute(1, 2, 0).numpy()
    assert np.abs(shown - expected).max() <= 1


def test_a_warning_made_an_error_is_not_the_image_s_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            decode(encoded(WAVES, "JPEG"))
        except DeprecationWarning:
            return  # of torchvision, where it has one


MEASURED = """
import json, resource, sys
from datasets.corpus import KINDS_OF_FILE, WAVES, encoded
from datasets.decode import decode
from datasets.errors import ContentError

files = [file.data for kind in sys.argv[1:] for file in KINDS_OF_FILE[kind]()]
for kind in ("JPEG", "PNG", "WEBP"):
    decode(encoded(WAVES, kind))  # imports what is imported late
found = []
for data in files:
    before = resource.getrusage(resource.RUSAGE_SELF)
    try:
        decode(data)
        fault = None
    except ContentError as error:
        fault = error.kind
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found.append([fault, seconds, (after.ru_maxrss - before.ru_maxrss) / 1024])
print(json.dumps(found))
"""


def test_bombs_take_neither_time_nor_memory():
    bombs = [kind for kind in KINDS_OF_FILE if "bomb" in kind]
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURED, *bombs],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(out.stdout)
    assert len(found) == 6
    for fault, seconds, mebibytes in found:
        assert fault in ("too_large", "corrupt")
        assert seconds < 2
        assert mebibytes < 100


LARGEST = """
import resource, struct, sys, zlib
from datasets.corpus import WAVES, encoded, png
from datasets.decode import decode

side = 8192
data = png(bytes((1 + 4 * side) * side), (side, side), depth=8, colour=6)
decode(encoded(WAVES, "PNG"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert decode(data).shape == (3, side, side)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_the_largest_image_that_is_decoded_takes_seven_bytes_a_pixel():
    """Pillow's four and ours of three; 64 MiB more for what is passing."""
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LARGEST],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(out.stdout) < 7 * 64 + 64


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


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP"]), keep=st.floats(0.001, 0.98))
def test_cut_files_are_called_truncated(kind, keep):
    whole = encoded(WAVES, kind)
    with pytest.raises(ContentError) as caught:
        decode(whole[: max(12, int(len(whole) * keep))])
    assert caught.value.kind == "truncated"
