"""The benchmark of the order: its bars, on fewer batches, and that its measure sees a bad shuffle."""

import sys

import numpy as np
import pytest

from benchmarks import order
from datasets.shards.manifest import Manifest


@pytest.fixture(scope="module")
def manifest():
    return Manifest.synthetic(order.SHARDS, order.SAMPLES)


@pytest.mark.parametrize("size", order.SIZES)
def test_classes_are_as_even_as_in_a_full_shuffle(size):
    measured = order.runs(size, 400, seed=3)
    assert (measured.counts.sum(1) == order.BATCH).all()
    assert measured.outside() < 0.013  # 0.7 % expected of 4,000 counts, with a standard deviation of 0.15
    assert measured.chi_square().mean() < 10  # 9 to 9.3 expected, with a standard deviation of 0.2


def test_whole_shards_in_the_same_window_are_not():
    measured = order.whole_shards(order.SIZES[-1], 100, seed=3)
    assert measured.outside() > 0.15
    assert measured.chi_square().mean() > 25


@pytest.mark.parametrize("size", [3_000, 1_000_000])
def test_the_band_is_that_of_draws_without_replacement(size):
    chances = order.spread(size)
    drawn = np.random.default_rng(0).hypergeometric(size // 10, size - size // 10, order.BATCH, 200_000)
    seen = np.bincount(drawn, minlength=order.BATCH + 1) / len(drawn)
    assert np.abs(seen - chances).max() < 0.004
    low, high = order.band(size)
    assert chances[:low].sum() <= 0.005 < chances[: low + 1].sum()
    assert chances[high + 1 :].sum() <= 0.005 < chances[high:].sum()


def test_a_billion_samples_are_opened_and_found_for_little(manifest, tmp_path):
    manifest.save(tmp_path / "manifest.json")
    opened = order.opened_elsewhere(tmp_path / "manifest.json")
    assert opened["located"] == 4096
    assert opened["megabytes"] < order.MEGABYTES
    assert opened["peak_megabytes"] < order.MEGABYTES
    assert opened["cpu_seconds"] < order.SECONDS


def test_a_position_leads_to_its_row_in_microseconds(manifest):
    assert manifest.size == 1_500_000_000
    assert order.walk(manifest, range(10**9, 10**9 + 20_000)) < order.MICROSECONDS


def test_the_command_prints_every_bar_and_draws(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(order, "SHARDS", 2_000)
    picture = tmp_path / "order.png"
    monkeypatch.setattr(sys, "argv", ["order", "--batches", "20", "--steps", "500", "--out", str(picture)])
    with pytest.raises(SystemExit):
        order.main()
    printed = capsys.readouterr().out
    assert all(f"{size:,}" in printed for size in order.SIZES)
    bars = [line.split("  bar ")[1] for line in printed.splitlines() if "  bar " in line]
    assert [bar.removesuffix("  MISSED") for bar in bars] == [
        *["1% of counts"] * len(order.SIZES),
        "200 MB",
        "200 MB",
        "1 s",
        "50 us CPU",
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
