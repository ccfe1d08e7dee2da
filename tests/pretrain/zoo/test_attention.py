import copy

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import AttentionalPooler, ResidualAttentionBlock, TextTransformer
from torch import nn

from pretrain.precision import choose_attention
from pretrain.zoo.attention import SpelledAttention, spell_out

N, T, S, W, H = 3, 7, 5, 24, 4


def spelled(module, kind="cpu"):
    """The same weights, with the attention that is chosen for a device."""
    twin = copy.deepcopy(module)
    choose_attention(twin, torch.device(kind))
    return twin


def same(ours, theirs, *arguments, tolerance=1e-12, **options):
    """Whether both say the same, and have the same gradients at inputs and parameters."""
    outcomes = []
    for module in (ours, theirs):
        leaves = [a.detach().clone().requires_grad_() for a in arguments]
        out = module(*leaves, **options)
        out = out[0] if isinstance(out, tuple) else out
        parameters = [p for p in module.parameters() if p.requires_grad]
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        grads = torch.autograd.grad((out * weight).sum(), [*leaves, *parameters], allow_unused=True)
        outcomes.append([out, *grads])
    for a, b in zip(*outcomes, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= tolerance * (1 + b.norm())


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def attention(**options):
    torch.manual_seed(0)
    made = nn.MultiheadAttention(W, H, **{"batch_first": True, **options}).double()
    for name, bias in made.named_parameters():
        if "bias" in name:
            nn.init.normal_(bias)
    return made


CAUSAL = torch.full((T, T), -torch.inf).triu(1)


@pytest.mark.parametrize("mask", [None, CAUSAL, draw(N * H, T, T)], ids=["none", "causal", "each"])
@pytest.mark.parametrize("bias", [True, False])
def test_it_says_what_torch_says_of_itself(mask, bias):
    theirs = attention(bias=bias)
    ours = spelled(theirs)
    assert type(ours) is SpelledAttention
    assert ours.state_dict().keys() == theirs.state_dict().keys()

    class Self(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x, x, x, need_weights=False, attn_mask=mask)

    same(Self(ours), Self(theirs), draw(N, T, W))


@pytest.mark.parametrize("mask", [None, draw(T, S), draw(N * H, T, S)], ids=["none", "all", "each"])
def test_it_says_what_torch_says_of_others(mask):
    theirs = attention()
    same(
        spelled(theirs),
        theirs,
        draw(N, T, W),
        draw(N, S, W),
        draw(N, S, W) + 1,
        need_weights=False,
        attn_mask=mask,
    )


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        ({}, {"need_weights": True}),
        ({}, {"key_padding_mask": torch.tensor([[False] * 4 + [True] * 3] * N)}),
        ({}, {"attn_mask": CAUSAL.isinf()}),
        ({"batch_first": False}, {}),
        ({"add_bias_kv": True}, {}),
        ({"add_zero_attn": True}, {}),
    ],
)
def test_what_it_is_not_made_for_is_left_to_torch(made, asked):
    theirs = attention(**made)
    x = draw(N, T, W)
    for a, b in zip(
        spelled(theirs)(x, x, x, **{"need_weights": False, **asked}),
        theirs(x, x, x, **{"need_weights": False, **asked}),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_dropout_is_left_to_torch():
    theirs = attention(dropout=0.5)
    ours = spelled(theirs)
    x = draw(N, T, W)
    torch.manual_seed(0)
    first = theirs(x, x, x, need_weights=False)[0]
    torch.manual_seed(0)
    assert torch.equal(ours(x, x, x, need_weights=False)[0], first)


@pytest.mark.parametrize("cross", [False, True])
def test_a_block_of_open_clip_is_the_same_to_1e_6_in_float32(cross):
    torch.manual_seed(0)
    theirs = ResidualAttentionBlock(W, H, is_cross_attention=cross)
    ours = spelled(theirs)
    x, image = draw(N, T, W, dtype=torch.float32), draw(N, S, W, dtype=torch.float32)
    if cross:
        same(ours, theirs, x, image, image, tolerance=1e-6)
    else:
        same(ours, theirs, x, attn_mask=CAUSAL, tolerance=1e-6)
        same(ours, theirs, x, tolerance=1e-6)


@pytest.mark.parametrize("options", [{}, {"embed_cls": True}, {"no_causal_mask": True, "use_pad_mask": True}])
def test_a_text_tower_of_open_clip_with_its_masks_is_the_same(options):
    torch.manual_seed(0)
    theirs = TextTransformer(
        context_length=T, vocab_size=11, width=W, heads=H, layers=2, output_dim=6, **options
    )
    tokens = torch.tensor([[1, 4, 10, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 10], [1, 10, 0, 0, 0, 0, 0]])
    ours = spelled(theirs)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-5, atol=1e-6)
    names = {name for name, part in ours.named_modules() if type(part) is SpelledAttention}
    assert names == {f"transformer.resblocks.{i}.attn" for i in range(2)}


def test_the_pooler_of_a_coca_is_the_same():
    torch.manual_seed(0)
    theirs = AttentionalPooler(W, 2 * W, n_head=H, n_queries=6)
    same(spelled(theirs), theirs, draw(N, T, 2 * W, dtype=torch.float32), tolerance=1e-6)


def test_a_whole_model_keeps_its_weights_names_and_its_encodings():
    torch.manual_seed(0)
    theirs = open_clip.CLIP(
        embed_dim=8,
        vision_cfg=CLIPVisionCfg(image_size=16, layers=2, width=16, patch_size=8, head_width=8),
        text_cfg=CLIPTextCfg(context_length=T, vocab_size=11, width=16, heads=2, layers=2),
    ).eval()
    ours = spelled(theirs)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    images = draw(2, 3, 16, 16, dtype=torch.float32)
    torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images), rtol=1e-5, atol=1e-6)


def test_elsewhere_torch_chooses():
    theirs = attention()
    assert type(spelled(theirs, "cuda")) is nn.MultiheadAttention
    twin = copy.deepcopy(theirs)
    spell_out(twin)
    assert type(copy.deepcopy(twin)) is SpelledAttention
