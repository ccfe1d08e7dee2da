from typing import Any

import open_clip
import pytest
import timm
import torch
from torchvision.transforms.v2.functional import normalize

from datasets.errors import UserError
from pretrain.zoo.towers import ImageTower
from pretrain.zoo.vision import build_image_tower

TOKENS = {
    "small": (64, 128),
    "timm:vit_tiny_patch16_224": (16, 192),  # a class token
    "timm:vit_small_patch16_dinov3": (16, 384),  # a class token and four registers
    "timm:convnext_atto": (4, 320),  # a map with channels first
    "timm:swin_tiny_patch4_window7_224": (4, 768),  # a map with channels last
    "timm:mambaout_femto": (4, 288),  # pooled wider than its map
    "open_clip:ViT-B-32": (4, 768),
    "open_clip:roberta-ViT-B-32": (4, 768),  # its text tower, which would be downloaded, is not asked for
    "open_clip:ViT-B-16-SigLIP": (16, 768),  # on timm, without a projection of its own
}


def pictures(count=2, side=64):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


@pytest.mark.parametrize("spec", TOKENS)
def test_shapes(spec):
    tower: Any = build_image_tower(spec, embed=24, resolution=64)
    assert isinstance(tower, ImageTower)
    assert tower.training
    pooled, tokens = tower(pictures())
    assert pooled.shape == (2, 24)
    assert tokens.shape == (2, *TOKENS[spec])
    assert (tower.width, tower.embed) == (tokens.shape[-1], 24)
    pooled.square().sum().backward()
    silent = [name for name, parameter in tower.named_parameters() if parameter.grad is None]
    assert not silent
    assert not [key for key in tower.state_dict() if "mean" in key or "std" in key]


@pytest.mark.parametrize("spec", ["small", "timm:vit_tiny_patch16_224", "timm:convnext_atto"])
def test_another_resolution_is_read_by_the_same_parameters(spec):
    tower: Any = build_image_tower(spec, embed=24, resolution=64)
    before = {name: parameter.data_ptr() for name, parameter in tower.named_parameters()}
    smaller, larger = tower(pictures()), tower(pictures(side=96))
    assert larger.pooled.shape == smaller.pooled.shape
    assert larger.tokens.shape[1] * 64**2 == smaller.tokens.shape[1] * 96**2
    assert before == {name: parameter.data_ptr() for name, parameter in tower.named_parameters()}


def test_timm_towers_give_what_timm_gives():
    tower: Any = build_image_tower("timm:vit_tiny_patch16_224", embed=192, resolution=64).eval()
    images = pictures()
    cfg: Any = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    pixels = normalize(images / 255, list(cfg.mean), list(cfg.std))
    pooled, tokens = tower(images)
    torch.testing.assert_close(pooled, tower.trunk(pixels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens, tower.trunk.forward_features(pixels)[:, 1:], rtol=1e-5, atol=1e-5)


def test_maps_are_read_row_by_row():
    for spec in ("timm:convnext_atto", "timm:swin_tiny_patch4_window7_224"):
        tower: Any = build_image_tower(spec, embed=24, resolution=64).eval()
        images = pictures(1)
        features = tower.trunk.forward_features((images - tower.mean) / tower.std)
        corner = features[0, 0, 1] if spec.startswith("timm:swin") else features[0, :, 0, 1]
        torch.testing.assert_close(tower(images).tokens[0, 1], corner)


def test_open_clip_towers_give_what_open_clip_gives():
    tower: Any = build_image_tower("open_clip:ViT-B-32", embed=24, resolution=64).eval()
    images = pictures()
    pixels = normalize(images / 255, list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD))
    expected = tower.visual(pixels)
    for ours, theirs in zip(tower(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_weights_are_drawn_from_the_global_seed():
    def first():
        torch.manual_seed(3)
        return build_image_tower("small", embed=24, resolution=64).state_dict()

    ours, again = first(), first()
    assert all(torch.equal(ours[key], again[key]) for key in ours)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("timm:vit_tiny_patch15_224", "did you mean timm:vit_tiny_patch16_224"),
        ("timm:hf-hub:someone/something", "unknown"),
        ("open_clip:ViT-B-33", "did you mean open_clip:ViT-B-32"),
        ("resnet18", "write small, timm:NAME or open_clip:NAME"),
        ("timm:resnet18", "BatchNorm .*LayerNorm"),
        ("open_clip:RN50", "BatchNorm .*LayerNorm"),
        ("open_clip:MobileCLIP-S1", "BatchNorm .*LayerNorm"),
        ("timm:vit_small_patch14_dinov2", "64 px.*divisible"),
        ("timm:coat_tiny", "no single map"),
    ],
)
def test_what_cannot_be_built_is_said_in_a_sentence(spec, says):
    with pytest.raises(UserError, match=says) as raised:
        build_image_tower(spec, embed=24, resolution=64)
    assert "\n" not in str(raised.value)


def test_open_clip_towers_resample_positions_as_timm_does():
    """What a tower of this size would give whose positions are timm's resampling; bicubic and antialiased."""
    tower: Any = build_image_tower("open_clip:ViT-B-32", embed=24, resolution=128).double()
    larger: Any = build_image_tower("open_clip:ViT-B-32", embed=24, resolution=224).double()
    state = tower.state_dict()
    key = "visual.positional_embedding"
    places = state[key][1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2).float()
    sampled = torch.nn.functional.interpolate(places, size=(7, 7), mode="bicubic", antialias=True)
    state[key] = torch.cat([state[key][:1], sampled[0].flatten(1).T.double()])
    larger.load_state_dict(state)
    images = pictures(side=224)
    torch.testing.assert_close(tower(images).pooled, larger(images).pooled, rtol=1e-12, atol=1e-12)
    timms: Any = build_image_tower("timm:vit_base_patch32_224", embed=24, resolution=128)
    with torch.no_grad():
        timms.trunk.pos_embed.copy_(tower.visual.positional_embedding[None])
    theirs = timms.trunk._pos_embed(torch.zeros(1, 7, 7, 768))[0, 1:]
    torch.testing.assert_close(theirs.double(), state[key][1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec", ["open_clip:ViT-B-32", "open_clip:ViT-B-16-SigLIP"])
def test_towers_of_open_clip_go_on_with_their_parameters_at_another_size(spec):
    tower: Any = build_image_tower(spec, embed=24, resolution=64)
    parameters = dict(tower.named_parameters())
    optimizer = torch.optim.AdamW(tower.parameters())
    sizes: list[int] = []
    for side in (64, 128, 64):
        encoded = tower(pictures(side=side))
        sizes.append(encoded.tokens.shape[1])
        encoded.pooled.square().sum().backward()
        optimizer.step()
    assert sizes[0] == sizes[2]
    assert sizes[1] == 4 * sizes[0]
    assert all(parameter is parameters[name] for name, parameter in tower.named_parameters())
    places = next(each for name, each in parameters.items() if "pos" in name)
    assert int(optimizer.state[places]["step"]) == 3
