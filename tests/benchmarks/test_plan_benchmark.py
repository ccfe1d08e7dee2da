"""The published hours of ViT-B/32 follow from a ninth of the peak of its GPUs."""

import pytest

from benchmarks.plan import PUBLISHED, compare


def test_vit_b_32():
    assert PUBLISHED["ViT-B-32"].gpus * PUBLISHED["ViT-B-32"].hours == 4608
    got = compare("ViT-B-32")
    # open_clip's model_profile.csv has the forward.
    assert got.gigaflops == pytest.approx(3 * 14.78, rel=0.005)
    assert got.model == pytest.approx(0.11, abs=0.005)
    assert got.hardware == got.model
    assert 5 < got.memory < 40
