import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pretrain.sinks import plots
from pretrain.sinks.jsonl import JsonLines


def metrics(path, **series):
    sink = JsonLines(path)
    for i in range(60):
        sink.step(i + 1, {"samples": 64 * (i + 1), **{name: make(i) for name, make in series.items()}})
    sink.close()
    return path


def test_the_files_and_their_panels(tmp_path, monkeypatch):
    drawn = {}
    panel = plots._panel
    monkeypatch.setattr(
        plots, "_panel", lambda axes, title, x, y: (drawn.update({title: (x, y)}), panel(axes, title, x, y))
    )
    path = metrics(
        tmp_path / "m",
        **{
            "train/loss": lambda i: 3.0 + i,
            "train/loss/itc": lambda i: math.nan if i == 5 else 1.0 + i,
            "train/loss/lm": lambda i: 2.0,
        },
        **{
            "perf/samples_per_second": lambda i: 9.0,
            "perf/data_wait": lambda i: 0.1,
            "perf/seconds_left": lambda i: 1.0,
        },
        **{"train/itc/accuracy": lambda i: i / 60},
    )
    made = plots.draw(path, tmp_path / "plots")
    assert [p.name for p in made] == ["losses.png", "throughput.png", "metrics.png"]
    assert set(drawn) == {
        "sum of all objectives, weighted",
        "itc loss",
        "lm loss",
        "samples per second",
        "share of time waiting for data",
        "train/itc/accuracy",
    }
    samples, values = drawn["itc loss"]
    kept = [i for i in range(60) if i != 5]
    np.testing.assert_array_equal(samples, [64.0 * (i + 1) for i in kept])
    np.testing.assert_array_equal(values, [1.0 + i for i in kept])
    for file in made:
        pixels = np.asarray(Image.open(file).convert("RGB"))
        assert pixels.min() < 120  # something is drawn
        assert (pixels == 255).mean() > 0.5  # on white


def test_one_objective_needs_no_sum_and_an_empty_file_draws_nothing(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(plots, "_panel", lambda axes, title, x, y: titles.append(title))
    path = metrics(tmp_path / "m", **{"train/loss": lambda i: 1.0, "train/loss/itc": lambda i: 1.0})
    assert [p.name for p in plots.draw(path, tmp_path / "plots")] == ["losses.png"]
    assert titles == ["itc loss"]
    (tmp_path / "empty").write_text("")
    assert plots.draw(tmp_path / "empty", tmp_path / "plots") == []


@pytest.mark.parametrize("length", [1, 2, 39, 80, 1000])
def test_smoothing_is_the_mean_around_each_point(length):
    values = np.random.default_rng(0).normal(size=length)
    half = max(length // 40, 1)
    expected = [values[max(0, i - min(i, half)) : i + min(i, half) + 1].mean() for i in range(length)]
    np.testing.assert_allclose(plots.smooth(values), expected, atol=1e-12)


def test_drawing_library_is_not_imported_before_it_is_needed():
    code = "import sys, pretrain.sinks.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
