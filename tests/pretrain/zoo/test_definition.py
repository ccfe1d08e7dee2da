"""Where a model's configuration comes from, and what is said when it is none."""

import json

import open_clip
import pytest

from datasets.errors import UserError
from pretrain.zoo.definition import CONFIG, define

TINY = {"embed_dim": 12, "vision_cfg": {"image_size": 32}, "text_cfg": {"context_length": 20}}
SEEN = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "interpolation": "bicubic"}


def seen(**changed):
    return json.dumps({"model_cfg": TINY, "preprocess_cfg": {**SEEN, **changed}})


def test_a_name_is_open_clips_and_the_copy_is_ours():
    known = open_clip.list_models()
    config = define("ViT-B-32").config
    assert config == open_clip.get_model_config("ViT-B-32")
    config["vision_cfg"]["layers"] = 1
    assert define("ViT-B-32").config["vision_cfg"]["layers"] == 12
    assert open_clip.list_models() == known


def test_a_file_and_a_directory(tmp_path, monkeypatch):
    (tmp_path / "bare.json").write_text(json.dumps(TINY))
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": SEEN}))
    bare, whole, folder = (define(str(tmp_path / name)) for name in ("bare.json", CONFIG, ""))
    assert bare.config == whole.config == folder.config == TINY
    assert bare.pixels is None
    assert whole.pixels == folder.pixels == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    # What lies beside a file was not asked for.
    assert (bare.folder, whole.folder, folder.folder) == (None, None, tmp_path)
    for silent in (seen(mean=None), json.dumps({"model_cfg": TINY, "preprocess_cfg": [1]})):
        (tmp_path / CONFIG).write_text(silent)
        assert define(str(tmp_path)).pixels is None
    monkeypatch.chdir(tmp_path.parent)
    assert define(tmp_path.name).config == TINY
    assert open_clip.get_model_config(str(tmp_path / "bare.json")) is None


def test_open_clips_own_names_go_before_directories(tmp_path, monkeypatch):
    (tmp_path / "ViT-B-32").mkdir()
    (tmp_path / "ViT-B-32" / CONFIG).write_text(json.dumps(TINY))
    monkeypatch.chdir(tmp_path)
    assert define("ViT-B-32").config["embed_dim"] == 512
    assert define("./ViT-B-32").config["embed_dim"] == 12


def test_the_tokenizer_beside_a_model_or_its_weights_is_taken_for_the_one_it_names(tmp_path):
    content = {**TINY, "text_cfg": {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}}
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": content}))
    folder, file = str(tmp_path), str(tmp_path / CONFIG)
    assert define(folder).tokenizer(pretrained=folder) == "timm/ViT-B-16-SigLIP"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert define(folder).tokenizer(pretrained="") == folder
    assert define(file).tokenizer(pretrained="") == "timm/ViT-B-16-SigLIP"
    assert define(file).tokenizer(pretrained=folder) == folder
    assert define("ViT-B-16-SigLIP").tokenizer(pretrained=folder) == folder
    assert define("ViT-B-32").tokenizer(pretrained=folder) == ""  # CLIP's own is at hand


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file or directory: .+odd.json"),
        ("{", "odd.json is not JSON: "),
        (
            "[]",
            "odd.json is no configuration of an open_clip model: it needs embed_dim, vision_cfg, text",
        ),
        ('{"vision_cfg": {}, "text_cfg": {}}', "it needs embed_dim, vision_cfg, text_cfg"),
        ('{"model_cfg": {"embed_dim": 1, "vision_cfg": 2, "text_cfg": {}}}', "it needs embed_dim"),
        ('{"model_cfg": null}', "it needs embed_dim"),
        ('{"model_cfg": [1]}', "it needs embed_dim"),
        (seen(mean=0.5), r"odd.json says that the mean of the pixels is 0.5: write a list of 3 numbers"),
        (seen(mean=[0.5]), r"the mean of the pixels is \[0.5\]: write"),
        (seen(std={}), r"the std of the pixels is \{\}: write"),
        (seen(std=[0.1, 0.2, "x"]), r"the std of the pixels is \[0.1, 0.2, 'x'\]: write"),
    ],
)
def test_what_is_no_configuration_is_said_in_a_sentence(content, reason, tmp_path):
    if content is not None:
        (tmp_path / "odd.json").write_text(content)
    with pytest.raises(UserError, match=reason) as raised:
        define(str(tmp_path / "odd.json"))
    assert "\n" not in str(raised.value)


def test_what_is_neither_a_name_nor_a_path(tmp_path):
    with pytest.raises(UserError, match="open_clip:ViT-B-33 is unknown: did you mean open_clip:ViT-B-32"):
        define("ViT-B-33")
    with pytest.raises(UserError, match=f"cannot be read: No such file or directory: .+{CONFIG}"):
        define(str(tmp_path))
