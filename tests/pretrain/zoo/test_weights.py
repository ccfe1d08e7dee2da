"""Every way to name weights, what they bring with them, and every wrong file said in a sentence."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from huggingface_hub import constants
from open_clip import pretrained as library
from safetensors.torch import load_file, save_file

from datasets import hub
from datasets.errors import UserError
from pretrain.zoo.definition import CONFIG, WEIGHTS, define
from pretrain.zoo.weights import find_weights
from pretrain.zoo.whole import build_whole

VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 20, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
CLIP = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
SEEN = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny(tmp_path):
    """A configuration file; its name."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(CLIP))
    return str(path)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made: Any = open_clip.CLIP(**CLIP)  # type: ignore[arg-type]
    with torch.no_grad():
        made.logit_scale.fill_(1.25)
    return made


def save(model, path):
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return str(path)


@pytest.fixture
def export(model, tmp_path):
    """A directory as open_clip exports one."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / CONFIG).write_text(
        json.dumps({"model_cfg": {**CLIP, "quick_gelu": True}, "preprocess_cfg": SEEN})
    )
    save(model, folder / WEIGHTS)
    return folder


def scale(whole) -> float:
    return whole.logit_scale.item()


def gelu(whole) -> str:
    return type(whole.image.visual.transformer.resblocks[0].mlp.gelu).__name__


def test_a_file_alone_says_nothing_of_its_pixels(model, tiny, tmp_path):
    whole = build_whole(tiny, pretrained=save(model, tmp_path / "model.safetensors"))
    assert (scale(whole), gelu(whole)) == (1.25, "GELU")
    assert whole.pixels == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


@pytest.mark.parametrize("inside", ["", WEIGHTS])
def test_a_directory_or_the_file_in_it_brings_pixels_and_activation(tiny, export, inside):
    whole: Any = build_whole(tiny, pretrained=str(export / inside))
    assert (scale(whole), gelu(whole)) == (1.25, "QuickGELU")
    assert whole.pixels == (tuple(SEEN["mean"]), tuple(SEEN["std"]))
    torch.testing.assert_close(whole.image.mean.flatten(), 255 * torch.tensor(SEEN["mean"]))


def test_a_directory_as_the_model_brings_its_weights_if_it_has_some(export):
    whole = build_whole(str(export))
    assert (scale(whole), gelu(whole)) == (1.25, "QuickGELU")
    assert whole.pixels.mean == tuple(SEEN["mean"])
    # The configuration alone, and another file of weights, are asked for by name.
    assert scale(build_whole(str(export / CONFIG))) != 1.25
    (export / WEIGHTS).unlink()
    whole = build_whole(str(export))
    assert scale(whole) != 1.25
    assert whole.pixels.mean == tuple(SEEN["mean"])


def test_weights_of_the_hub_as_weights_and_as_the_model(tiny, export, monkeypatch):
    asked = []

    def fetch(repository, file, *, instead):
        asked.append((repository, file))
        assert "local directory" in instead
        return export / file

    monkeypatch.setattr(hub, "fetch", fetch)
    for whole in (build_whole(tiny, pretrained="hf-hub:us/tiny"), build_whole("hf-hub:us/tiny")):
        assert (scale(whole), gelu(whole)) == (1.25, "QuickGELU")
        assert whole.pixels.mean == tuple(SEEN["mean"])
    assert set(asked) == {("hf-hub:us/tiny", CONFIG), ("hf-hub:us/tiny", WEIGHTS)}


@pytest.fixture
def tagged(monkeypatch):
    """A tag that open_clip knows, of a model that it knows."""
    tag = {"hf_hub": "us/tiny/", "quick_gelu": True, **SEEN}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", CLIP)
    monkeypatch.setitem(library._PRETRAINED, "tiny-clip", {"ours": tag})
    return tag


def test_a_tag_brings_its_pixels_and_its_activation(model, tagged, tmp_path, monkeypatch):
    path = save(model, tmp_path / "model.safetensors")
    asked = []
    fetch = lambda repository, file, **_: asked.append((repository, file)) or Path(path)  # noqa: E731
    monkeypatch.setattr(hub, "fetch", fetch)
    whole: Any = build_whole("tiny-clip", pretrained="ours")
    tagged["hf_hub"] = "us/tiny/older.pt"
    build_whole("tiny-clip", pretrained="ours")
    assert asked == [("us/tiny", WEIGHTS), ("us/tiny", "older.safetensors")]
    assert (scale(whole), gelu(whole)) == (1.25, "QuickGELU")
    assert type(whole.text.tower.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert whole.pixels == (tuple(SEEN["mean"]), tuple(SEEN["std"]))


def test_who_has_other_weights_fetches_none(tagged):
    whole = build_whole("tiny-clip", pretrained="ours", load=False)
    assert (gelu(whole), whole.pixels.mean) == ("QuickGELU", tuple(SEEN["mean"]))


def test_weights_of_a_siglip_model_are_normalised_as_all_its_published_ones_are():
    assert find_weights(define("ViT-B-16-SigLIP"), "").pixels.mean == (0.5, 0.5, 0.5)
    assert find_weights(define("ViT-B-32"), "").pixels.mean == open_clip.OPENAI_DATASET_MEAN


def says(pretrained, name):
    with pytest.raises(UserError) as raised:
        build_whole(name, pretrained=str(pretrained))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_out_of_reach_the_sentence_ends_with_a_local_path(tiny):
    message = says("openai", "ViT-B-32")
    assert message.startswith(f"{WEIGHTS} of timm/vit_base_patch32_clip_224.openai is not in the cache")
    assert message.endswith("name a local .safetensors file: --model.pretrained PATH")
    for name, pretrained in ((tiny, "hf-hub:us/tiny"), ("hf-hub:us/tiny", "")):
        message = says(pretrained, name)
        assert message.startswith(f"{CONFIG} of us/tiny is not in the cache")
        assert message.endswith(f"name a local directory with {CONFIG} and {WEIGHTS} in its place")


def test_a_missing_file_lists_the_tags(tmp_path, tiny):
    message = says("absent.safetensors", "ViT-B-32")
    assert message.startswith(
        "absent.safetensors is neither a file, a directory nor a tag of open_clip:ViT-B-32"
    )
    assert "laion2b_s34b_b79k" in message
    assert says(tmp_path, tiny) == f"{tmp_path} is a directory without {WEIGHTS}"


def test_a_pickle_is_refused_with_the_command_that_converts_it(model, tiny, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    message = says(tmp_path / "model.pt", tiny)
    python, flag, code = shlex.split(message[message.index("python -c") :])
    assert (python, flag) == ("python", "-c")
    exec(compile(code, "the command of the message", "exec"), {})
    converted = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())
    build_whole(tiny, pretrained=str(tmp_path / "model.safetensors"))


def test_files_that_do_not_fit_name_what_does_not(model, tiny, tmp_path):
    path = tmp_path / "model.safetensors"

    def with_state(change):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        change(state)
        save_file(state, path)
        return says(path, tiny)

    assert "it lacks the key logit_scale" in with_state(lambda state: state.pop("logit_scale"))
    assert "it lacks visual.proj" in with_state(lambda state: state.pop("visual.proj"))
    assert "has no place for visual.extra and 1 more keys" in with_state(
        lambda state: state.update({"visual.extra": torch.zeros(1), "visual.other": torch.zeros(1)})
    )
    assert "has no place for text_decoder.proj" in with_state(
        lambda state: state.update({"text_decoder.proj": torch.zeros(1)})
    )
    assert "size mismatch for text.token_embedding.weight" in with_state(
        lambda state: state.update({"token_embedding.weight": torch.zeros(65, 16)})
    )
    assert "logit_bias" in with_state(lambda state: state.update({"logit_bias": torch.zeros(())}))
    assert "width changed" in with_state(
        lambda state: state.update({"positional_embedding": torch.zeros(20, 8)})
    )
    path.write_bytes(path.read_bytes()[:1000])
    assert re.search(r"model\.safetensors is not a readable safetensors file", says(path, tiny))


def test_a_coca_without_its_decoder_is_none(model, tmp_path):
    config = {
        **CLIP,
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {**VISION, "width": 16, "head_width": 8, "output_tokens": True},
        "multimodal_cfg": {"layers": 1, "width": 16, "heads": 2, "context_length": 20},
    }
    (tmp_path / "coca.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    whole: Any = open_clip.CustomTextCLIP(
        **{key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
    )
    path = save(whole, tmp_path / "dual.safetensors")
    assert "it lacks text_decoder." in says(path, str(tmp_path / "coca.json"))
