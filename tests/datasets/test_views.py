from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasets.errors import UserError
from datasets.views import Augment, View, fixed_view, random_view

SIDES = st.integers(1, 700)


def noise(height, width):
    random = np.random.default_rng(height)
    coarse = Image.fromarray(random.integers(0, 255, (1 + height // 6, 1 + width // 6, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("resolution", [32, 64, 224])
@pytest.mark.parametrize(("height", "width"), [(299, 224), (100, 333), (48, 48)])
@pytest.mark.parametrize("random", [False, True])
def test_pixels_are_those_of_pillows_bicubic(height, width, resolution, random):
    image = noise(height, width)
    key = (height, resolution)
    view = random_view(height, width, augment=Augment(), key=key) if random else fixed_view(height, width)
    ours = view.pixels(torch.from_numpy(image.copy()).permute(2, 0, 1), resolution=resolution)
    assert ours.shape == (3, resolution, resolution)
    corners = (view.left, view.top, view.left + view.width, view.top + view.height)
    part = Image.fromarray(image).crop(corners)
    pillows = np.asarray(part.resize((resolution, resolution), Image.Resampling.BICUBIC)).astype(int)
    apart = np.abs(ours.permute(1, 2, 0).numpy() - (pillows[:, ::-1] if view.flip else pillows))
    assert apart.max() <= 2
    assert apart.mean() < 0.2


def test_fixed_view_is_the_central_square():
    assert fixed_view(300, 200) == View(image=(300, 200), top=50, left=0, height=200, width=200)
    assert fixed_view(3, 8) == View(image=(3, 8), top=0, left=2, height=3, width=3)


@given(height=SIDES, width=SIDES, crop=st.floats(0.01, 1), key=st.tuples(st.integers(), st.integers()))
def test_random_views_lie_in_the_image(height, width, crop, key):
    view = random_view(height, width, augment=Augment(crop=crop), key=key)
    assert view == random_view(height, width, augment=Augment(crop=crop), key=key)
    assert 0 <= view.top <= view.top + view.height <= height
    assert 0 <= view.left <= view.left + view.width <= width
    assert min(view.height, view.width) > 0
    if min(height, width) > 30:
        assert 3 / 4 - 0.1 < view.width / view.height < 4 / 3 + 0.1


def test_random_views_have_the_declared_distribution():
    views = [random_view(400, 400, augment=Augment(crop=0.2), key=(i,)) for i in range(4000)]
    small = [v for v in views if v.height * v.width < 0.5 * 160_000]  # these fit whatever their aspect
    shares = [v.height * v.width / 160_000 for v in small]
    assert abs(fmean(shares) - 0.35) < 0.01
    assert min(shares) > 0.19
    assert abs(fmean(np.log(v.width / v.height) for v in small)) < 0.01
    assert abs(fmean(v.top / (400 - v.height) for v in small) - 0.5) < 0.02
    assert abs(fmean(v.flip for v in views) - 0.5) < 0.03
    assert not any(random_view(9, 9, augment=Augment(flip=False), key=(i,)).flip for i in range(50))


@given(height=SIDES, width=SIDES, key=st.integers())
def test_boxes_follow_the_pixels(height, width, key):
    """A box is where it was painted: its corners, traced through crop and mirror by hand."""
    view = random_view(height, width, augment=Augment(crop=0.3), key=(key,))
    whole = view.box((0, 0, 1, 1))
    assert whole == (0, 0, 1, 1)
    inner = (
        (view.left + view.width / 4) / width,
        (view.top + view.height / 2) / height,
        (view.left + view.width / 2) / width,
        (view.top + view.height) / height,
    )
    expected = (0.5, 0.5, 0.75, 1.0) if view.flip else (0.25, 0.5, 0.5, 1.0)
    assert view.box(inner) == pytest.approx(expected, abs=1e-6)


def test_painted_box_is_found_in_the_view():
    image = torch.zeros(3, 200, 300, dtype=torch.uint8)
    image[:, 90:130, 110:190] = 255
    for key in range(20):
        view = random_view(200, 300, augment=Augment(), key=(key,))
        seen = view.pixels(image, resolution=100)[0] > 127
        box = view.box((110 / 300, 90 / 200, 190 / 300, 130 / 200))
        assert box is not None
        rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
        found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert [float(x) / 100 for x in found] == pytest.approx(box, abs=0.011)


def test_box_outside_the_view_is_gone():
    assert fixed_view(100, 300).box((0.0, 0.0, 0.3, 1.0)) is None
    assert fixed_view(100, 300).box((0.0, 0.0, 0.5, 1.0)) == (0.0, 0.0, 0.5, 1.0)


@pytest.mark.parametrize("crop", [0, -1, 1.5, float("nan")])
def test_impossible_crop_is_refused(crop):
    with pytest.raises(UserError, match="crop is the least share"):
        Augment(crop=crop)
