"""The benchmark of a step: both sides take the same steps, and the bars are held against their times."""

import json

import pytest

from benchmarks import step


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model that is small but reads what the large one reads."""
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 112},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-step.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    open_clip.add_model_config(tmp_path)
    return "tiny-step"


@pytest.mark.parametrize("kind", ["bf16", "float32"])
def test_both_sides_take_the_same_steps(model, monkeypatch, capsys, kind):
    # So small a model is not as sure as a large one: the second step goes by the sign of small gradients.
    monkeypatch.setattr(step, "CLOSE", {"bf16": 0.1, "float32": 1e-4})
    times = {"open_clip": [2.0, 4.0], "unpadded": [1.0, 2.0], "padded": [1.25, 2.5]}
    monkeypatch.setattr(step, "in_turns", lambda calls, **_: {name: times[name] for name in calls})
    assert step.main(["--model", model, "--batch", "4", "--arithmetic", kind]) == 0
    said = capsys.readouterr().out.splitlines()
    assert float(said[0].split()[-2]) <= step.CLOSE[kind]
    assert [line.split()[0] for line in said[1:]] == [*times]
    assert "2.00x" in said[2]
    assert "1.60x" in said[3]
    times["padded"] = [2.5, 5.0]
    assert step.main(["--model", model, "--batch", "4", "--arithmetic", kind]) == 1
    assert capsys.readouterr().out.splitlines()[3].endswith("MISSED")


def test_captions_have_10_to_20_words():
    lengths = {len(caption.split()) for caption in step.read_captions("", 200)}
    assert lengths == set(range(10, 21))


def test_captions_of_a_source():
    assert step.read_captions("scenes", 3)[0]
