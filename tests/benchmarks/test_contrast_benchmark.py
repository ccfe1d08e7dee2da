"""The benchmark of contrast: all compute the same loss, and bars are held against what was measured."""

import pytest
import torch

from benchmarks import contrast


@pytest.mark.parametrize("kind", ["itc", "siglip"])
def test_all_compute_the_same_loss(kind):
    image, text = (side.double() for side in contrast.embeddings(1300))
    scale = torch.tensor(14.3, dtype=torch.float64)
    losses = contrast.implementations(kind)
    values = {name: losses[name](image, text, scale).item() for name in losses if name != "bf16 wire"}
    assert len(values) == (2 if kind == "itc" else 3)
    assert list(values.values()) == [pytest.approx(values["open_clip"], rel=1e-12)] * len(values)


@pytest.mark.slow
@pytest.mark.parametrize(("bar", "code"), [(("open_clip", 1e9, 1e9), 0), (("open_clip", 1e9, 1e-9), 1)])
def test_time_memory_and_error_are_told_and_held_against_the_bars(monkeypatch, capsys, bar, code):
    monkeypatch.setitem(contrast.BARS, "itc", bar)
    monkeypatch.setattr(contrast, "JUDGED", 256)
    assert contrast.main(["--batch", "512", "--rounds", "1"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["medley", "open_clip", "bf16 wire"]
    ours, _, wire = (list(map(float, line.split()[-3:])) for line in lines[1:4])
    assert max(ours) < 2e-5
    assert 1e-4 < wire[0] < 1e-1
    assert lines[-1].endswith("met" if code == 0 else "MISSED")
