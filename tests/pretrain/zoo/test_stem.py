import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pretrain.zoo.stem import Stem


def trunk(**options):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=64,
        patch_size=8,
        embed_dim=32,
        depth=1,
        num_heads=2,
        class_token=False,
        global_pool="map",
        num_classes=0,
        dynamic_img_size=True,
        embed_layer=functools.partial(Stem, **options),
    )


@pytest.mark.parametrize("patch", [2, 4, 8, 16])
def test_one_token_is_left_of_each_patch(patch):
    stem = Stem(64, patch, embed_dim=32)
    assert stem(torch.rand(2, 3, 64, 64)).shape == (2, 64 // patch, 64 // patch, 32)
    assert stem.num_patches == (64 // patch) ** 2
    assert stem.feat_ratio() == patch


def test_a_stem_is_its_formula():
    stem = Stem(32, 8, embed_dim=16, residuals=2).double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    y = x
    weights = dict(stem.named_parameters())
    for i, width in enumerate((4, 8, 16)):
        y = F.conv2d(y, weights[f"halve.{i}.weight"], weights[f"halve.{i}.bias"], stride=2, padding=1)
        assert y.shape[1] == width
        y = y.relu() if i < 2 else y
    for i in range(2):
        y = y + F.conv2d(y, weights[f"refine.{i}.weight"], weights[f"refine.{i}.bias"], padding=1).relu()
    expected = F.layer_norm(y.movedim(1, -1), (16,))
    torch.testing.assert_close(stem(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (32, 64), (224, 224)])
def test_a_timm_transformer_reads_any_multiple_of_the_patch(size):
    model = trunk()
    tokens = model.forward_features(torch.rand(2, 3, *size))
    assert tokens.shape == (2, size[0] * size[1] // 64, 32)
    assert model.forward_head(tokens).shape == (2, 32)


def test_other_sizes_are_refused():
    with pytest.raises(AssertionError, match="no multiple of 8"):
        trunk()(torch.rand(1, 3, 60, 64))
    with pytest.raises(AssertionError, match="no power of two"):
        Stem(63, 7)


def test_timm_leaves_the_initialisation_alone():
    stem = trunk(residuals=3).patch_embed
    assert len(stem.refine) == 3
    for convolution in [*stem.halve, *stem.refine]:
        fan_in = convolution.weight[0].numel()
        gain = 0.3 if convolution.stride == (1, 1) else 1.0
        assert abs(convolution.weight.std() / (gain * (2 / fan_in) ** 0.5) - 1) < 0.15
        assert not convolution.bias.any()


def test_every_parameter_learns_and_nothing_counts_over_the_batch():
    stem = Stem(32, 8, embed_dim=16)
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(stem(x)[:2], stem(x[:2]))
    (stem(x) ** 3).sum().backward()
    for name, parameter in stem.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in stem.modules())
