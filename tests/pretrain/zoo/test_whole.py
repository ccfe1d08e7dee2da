"""Whole models of open_clip, taken apart and put together: equal to its own, and the same weights."""

import json
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import normalize

from datasets.errors import UserError
from pretrain.zoo.dual import Dual
from pretrain.zoo.text import build_small_text
from pretrain.zoo.vision import build_image_tower
from pretrain.zoo.whole import build_whole, open_clip_state

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
        "embed_dim": 16, "custom_text": True, "vision_cfg": COCA_VISION, "text_cfg": COCA_TEXT,
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
    if name == "tiny-coca":
        torch.nn.init.normal_(model.text_decoder.text_projection)  # or it is what memory happened to be
    with torch.no_grad():
        model.logit_scale.fill_(1.25)
    return model


def saved(model, path):
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return str(path)


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
    pixels = normalize(images.double() / 255, list(model.visual.image_mean), list(model.visual.image_std))
    padded = torch.nn.functional.pad(tokens, (0, 20 - 9))
    torch.testing.assert_close(whole.logit_scale, model.logit_scale.reshape(1))
    model.double()
    with torch.no_grad():
        pooled = whole.image.double().eval()(images).pooled, whole.text.double().eval()(tokens, length).pooled
        torch.testing.assert_close(
            pooled[0], model.encode_image(pixels, normalize=False), rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(
            pooled[1], model.encode_text(padded, normalize=False), rtol=1e-9, atol=1e-12
        )
    assert whole.logit_scale.shape == (1,)
    if name == "tiny-siglip":
        torch.testing.assert_close(whole.logit_bias, torch.tensor([-10.0]))
    else:
        assert whole.logit_bias is None


@pytest.mark.parametrize("name", TINY)
def test_each_parameter_is_registered_once(name):
    model = dual(build_whole(name))
    held = [id(parameter) for parameter in model.parameters()]
    assert len(held) == len(set(held)) == len(list(model.named_parameters(remove_duplicate=False)))


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


def test_a_resolution_that_does_not_fit_and_a_tower_that_cannot_be_wrapped():
    with pytest.raises(UserError, match=r"open_clip:tiny-clip does not work at 4 px: .+"):
        build_whole("tiny-clip", resolution=4)
    with pytest.raises(UserError, match="BatchNorm"):
        build_whole("RN50")


def test_a_key_that_open_clip_does_not_know(tmp_path):
    for part, key in (("vision_cfg", "depth"), ("text_cfg", "depth")):
        config = {**TINY["tiny-clip"], part: {**TINY["tiny-clip"][part], key: 1}}
        (tmp_path / "odd.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"odd\.json: .+unexpected keyword argument 'depth'"):
            build_whole(str(tmp_path / "odd.json"))


def test_a_text_tower_of_transformers_is_read_from_a_directory_or_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants
    from transformers import AutoConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    AutoConfig.for_model("roberta", vocab_size=64, **sizes).save_pretrained(tmp_path / "tower")
    text = {"hf_model_name": str(tmp_path / "tower"), "hf_pooler_type": "mean_pooler", "context_length": 20}
    config = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": text}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    whole = build_whole(str(tmp_path / "tiny.json"))
    assert (whole.text.width, whole.text.embed, whole.text.context_length) == (16, 12, 20)

    text["hf_model_name"] = "no-such/tower"
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"config\.json of no-such/tower is not in the cache .+ local directory"
    ):
        build_whole(str(tmp_path / "tiny.json"))


def dual(whole) -> Dual:
    return Dual(
        image=whole.image,
        text=whole.text,
        captioner=whole.captioner,
        fusion=None,
        logit_scale=whole.logit_scale,
        logit_bias=whole.logit_bias,
    )


@pytest.mark.parametrize("name", TINY)
def test_the_state_is_open_clips_own(name, tmp_path):
    model = theirs(name)
    whole = build_whole(name, pretrained=saved(model, tmp_path / "model.safetensors"))
    state = open_clip_state(dual(whole), custom_text=TINY[name].get("custom_text", False))
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert state["logit_scale"].shape == ()
    model.load_state_dict(state)


def test_the_state_of_a_dual_encoder_of_two_libraries_is_one_of_open_clip():
    torch.manual_seed(0)
    text = build_small_text(vocabulary=64, width=16, layers=2, heads=2, context_length=20, embed=12, end_id=2)
    for image, vision in (
        ("open_clip:tiny-clip", VISION),
        ("timm:vit_tiny_patch16_224", {**TIMM, "timm_pool": ""}),
    ):
        side = vision["image_size"]
        model = Dual(
            image=build_image_tower(image, embed=12, resolution=side),
            text=text,
            captioner=None,
            fusion=None,
            logit_scale=torch.zeros(1),
            logit_bias=None,
        )
        config: Any = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": {**TEXT, "pool_type": "eos"}}
        built: Any = open_clip.CLIP(**config).eval()
        built.load_state_dict(open_clip_state(model, custom_text=False))
        images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
        tower: Any = model.image.eval()
        with torch.no_grad():
            expected = built.encode_image((images - tower.mean) / tower.std)
            torch.testing.assert_close(tower(images).pooled, expected, rtol=1e-5, atol=1e-6)
