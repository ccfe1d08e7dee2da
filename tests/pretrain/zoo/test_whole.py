"""Whole dual encoders: embeddings equal to open_clip's own, and every wrong file said in a sentence."""

import json
import re
import shlex
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2.functional import normalize

from datasets.errors import UserError
from pretrain.zoo.whole import build_whole

VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 20, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}
TIMM = {
    "timm_model_name": "vit_tiny_patch16_224",
    "timm_pool": "token",
    "timm_proj": "linear",
    "image_size": 224,
}
SIGLIP = {
    **TEXT,
    "no_causal_mask": True,
    "pool_type": "last",
    "proj_bias": True,
    "norm_kwargs": {"eps": 1e-6},
}
COCA_VISION = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
COCA_TEXT = {**TEXT, "embed_cls": True, "output_tokens": True}
DECODER = {"layers": 1, "width": 16, "heads": 2, "context_length": 20}
TINY = {
    "tiny-clip": {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT},
    "tiny-clip-quickgelu": {"embed_dim": 12, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "tiny-custom": {"embed_dim": 12, "custom_text": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "tiny-timm": {"embed_dim": 12, "custom_text": True, "vision_cfg": TIMM, "text_cfg": TEXT},
    "tiny-coca": {
        "embed_dim": 12, "custom_text": True, "vision_cfg": COCA_VISION, "text_cfg": COCA_TEXT,
        "multimodal_cfg": DECODER,
    },
    "tiny-siglip": {
        "embed_dim": 12, "custom_text": True, "vision_cfg": VISION, "text_cfg": SIGLIP,
        "init_logit_bias": -10,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    """Small models in open_clip's own list, for the time of a test."""
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, config in TINY.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def theirs(name) -> Any:
    torch.manual_seed(0)
    model: Any = open_clip.create_model(name, pretrained_text=False).eval()
    with torch.no_grad():
        model.logit_scale.fill_(1.25)
    return model


def saved(model, path):
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return str(path)


def embedded(whole, images, tokens, length):
    whole.image.eval()
    whole.text.eval()
    with torch.no_grad():
        return whole.image(images).pooled, whole.text(tokens, length).pooled


@pytest.mark.parametrize("name", TINY)
def test_embeddings_equal_open_clips(name, tmp_path):
    model = theirs(name)
    torch.manual_seed(1)  # so that only the file can make the weights equal
    whole: Any = build_whole(name, pretrained=saved(model, tmp_path / "model.safetensors"))
    side = model.visual.image_size[0]
    assert whole.resolution == side
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    tokens = torch.randint(1, 62, (3, 9))
    length = torch.tensor([9, 4, 6])
    tokens[torch.arange(3), length - 1] = 63
    tokens.masked_fill_(torch.arange(9) >= length[:, None], 0)
    pixels = normalize(images / 255, list(model.visual.image_mean), list(model.visual.image_std))
    padded = torch.nn.functional.pad(tokens, (0, 20 - 9))
    with torch.no_grad():
        expected = model.encode_image(pixels, normalize=False), model.encode_text(padded, normalize=False)
    for ours, reference in zip(embedded(whole, images, tokens, length), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.logit_scale, model.logit_scale.reshape(1))
    assert whole.logit_scale.shape == (1,)
    if name == "tiny-siglip":
        torch.testing.assert_close(whole.logit_bias, torch.tensor([-10.0]))
    else:
        assert whole.logit_bias is None


@pytest.mark.parametrize("name", TINY)
def test_each_parameter_is_registered_once(name, tmp_path):
    whole = build_whole(name)
    parts = torch.nn.ModuleDict({"image": whole.image, "text": whole.text})
    held = [id(parameter) for parameter in parts.parameters()]
    assert len(held) == len(set(held)) == len(list(parts.named_parameters(remove_duplicate=False)))
    state = theirs(name).state_dict()
    decoder = [key for key in state if key.startswith("text_decoder.")]
    scalars = [key for key in state if key.startswith("logit_")]
    assert len(parts.state_dict()) == len(state) - len(decoder) - len(scalars)
    save_file(parts.state_dict(), tmp_path / "parts.safetensors")  # refuses tensors that share memory


def test_another_resolution_resamples_as_open_clip_does(tmp_path):
    for name, side in (("tiny-clip", 48), ("tiny-timm", 96)):
        path = saved(theirs(name), tmp_path / f"{name}.safetensors")
        whole: Any = build_whole(name, pretrained=path, resolution=side)
        model: Any = open_clip.create_model(name, pretrained=path, force_image_size=side).double().eval()
        images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
        pixels = normalize(images.double() / 255, list(model.visual.image_mean), list(model.visual.image_std))
        with torch.no_grad():
            expected = model.encode_image(pixels)
            pooled = whole.image.double().eval()(images).pooled
        torch.testing.assert_close(pooled, expected, rtol=1e-6, atol=1e-6)


def test_a_tag_brings_its_preprocessing_and_its_activation(tmp_path, monkeypatch):
    from open_clip import pretrained

    path = saved(theirs("tiny-clip-quickgelu"), tmp_path / "model.safetensors")
    asked = []
    tag = {"hf_hub": "us/tiny/", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "quick_gelu": True}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-clip", {"ours": tag})
    fetch = lambda repository, filename: asked.append((repository, filename)) or path  # noqa: E731
    monkeypatch.setattr(pretrained, "download_pretrained_from_hf", fetch)
    whole: Any = build_whole("tiny-clip", pretrained="ours")
    assert asked == [("us/tiny", "open_clip_model.safetensors")]
    assert (whole.mean, whole.std) == (tag["mean"], tag["std"])
    torch.testing.assert_close(whole.image.mean.flatten(), 255 * torch.tensor(tag["mean"]))
    blocks = [whole.image.visual.transformer.resblocks[0], whole.text.tower.transformer.resblocks[0]]
    assert [type(block.mlp.gelu).__name__ for block in blocks] == ["QuickGELU", "QuickGELU"]


def test_a_file_of_a_siglip_model_is_normalised_as_all_its_published_weights_are():
    from pretrain.zoo.whole import _find

    assert _find("ViT-B-16-SigLIP", "").mean == (0.5, 0.5, 0.5)
    assert _find("ViT-B-32", "").mean == open_clip.OPENAI_DATASET_MEAN


def says(pretrained, name="tiny-clip"):
    with pytest.raises(UserError) as raised:
        build_whole(name, pretrained=str(pretrained))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_an_unknown_name_and_a_size_that_does_not_fit():
    assert "did you mean open_clip:tiny-clip?" in says("", name="tiny-clop")
    assert "BatchNorm" in says("", name="RN50")
    with pytest.raises(UserError, match=r"open_clip:tiny-clip does not work at 4 px: .+"):
        build_whole("tiny-clip", resolution=4)


def test_a_missing_file_lists_the_tags():
    assert "is neither a file nor a tag of open_clip:ViT-B-32" in says("absent.safetensors", name="ViT-B-32")
    assert "laion2b_s34b_b79k" in says("absent.safetensors", name="ViT-B-32")


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path):
    model = theirs("tiny-clip")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    message = says(tmp_path / "model.pt")
    python, flag, code = shlex.split(message[message.index("python -c") :])
    assert (python, flag) == ("python", "-c")
    exec(compile(code, "the command of the message", "exec"), {})
    converted = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())
    build_whole("tiny-clip", pretrained=str(tmp_path / "model.safetensors"))


def test_files_that_do_not_fit_name_what_does_not(tmp_path):
    path = tmp_path / "model.safetensors"
    whole = theirs("tiny-clip").state_dict()

    def with_state(change):
        state = {key: value.clone() for key, value in whole.items()}
        change(state)
        save_file(state, path)
        return says(path)

    assert "it lacks the key logit_scale" in with_state(lambda state: state.pop("logit_scale"))
    assert "it lacks visual.proj" in with_state(lambda state: state.pop("visual.proj"))
    assert "has no place for visual.extra and 1 more keys" in with_state(
        lambda state: state.update({"visual.extra": torch.zeros(1), "visual.other": torch.zeros(1)})
    )
    assert "size mismatch for text.token_embedding.weight" in with_state(
        lambda state: state.update({"token_embedding.weight": torch.zeros(65, 16)})
    )
    assert "logit_bias" in with_state(lambda state: state.update({"logit_bias": torch.zeros(())}))
    assert "width changed" in with_state(
        lambda state: state.update({"positional_embedding": torch.zeros(20, 8)})
    )
    path.write_bytes(path.read_bytes()[:1000])
    assert re.search(r"model\.safetensors is not a readable safetensors file", says(path))


def test_the_hub_out_of_reach(monkeypatch):
    from open_clip import pretrained
    from transformers import AutoConfig

    def offline(*_, **__):
        raise FileNotFoundError("no network here\nreally none")

    monkeypatch.setattr(pretrained, "download_pretrained_from_hf", offline)
    assert "check the network, or name a local .safetensors file" in says("openai", name="ViT-B-32")
    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    assert "roberta-base" in says("", name="roberta-ViT-B-32")
