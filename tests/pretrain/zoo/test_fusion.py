"""The text tower that looks at an image: what it shares with the tower that does not, and what it sees."""

import copy
from typing import Any

import pytest
import torch
from open_clip.transformer import TextTransformer
from torch import nn

from datasets.errors import UserError
from pretrain.zoo.fusion import Fusion, build_fusion
from pretrain.zoo.text import HubText, OpenClipText, build_small_text

WIDTH, LAYERS, IMAGE_WIDTH, END = 16, 3, 12, 39
IMAGES, PATCHES = 4, 5
TEXT: dict[str, Any] = {
    "output_dim": 10,
    "context_length": 12,
    "vocab_size": 40,
    "width": WIDTH,
    "heads": 2,
    "layers": LAYERS,
}
KINDS: dict[str, dict[str, Any]] = {
    "end": {},
    "eos": {"pool_type": "eos", "eos_id": END},
    "class token": {"embed_cls": True, "correct_cls_mask": True},
    "CoCa's class token": {"embed_cls": True},
    "padding is masked": {"no_causal_mask": True, "use_pad_mask": True},
    "padding is seen": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    "scaled blocks": {"qk_norm": True, "scale_attn": True, "scale_fc": True, "scale_heads": True},
    "layer scale": {"ls_init_value": 0.5},
}


def tower_of(kind: str) -> OpenClipText:
    torch.manual_seed(0)
    return OpenClipText(TextTransformer(**TEXT | KINDS[kind]))


def loud(fusion: Fusion) -> Fusion:
    """So that no part is too small to be seen."""
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.4)
    return fusion


def made(kind: str = "end", **config: int) -> tuple[OpenClipText, Fusion]:
    text = tower_of(kind)
    fusion = Fusion(Fusion.Config(**config), text=text, image_width=IMAGE_WIDTH)
    return text.double(), loud(fusion).double()


def pairs(lengths=(3, 9, 1, 7, 5), image=(0, 3, 0, 1, 0)):
    """Image 2 is in no pair, image 0 in three."""
    generator = torch.Generator().manual_seed(1)
    image_tokens = torch.randn(IMAGES, PATCHES, IMAGE_WIDTH, dtype=torch.float64, generator=generator)
    tokens = torch.zeros(len(lengths), max(lengths, default=0), dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(3, END, (length,), generator=generator)
        row[length - 1] = END
    return image_tokens, torch.tensor(image, dtype=torch.long), tokens, torch.tensor(lengths)


def unprojected(text: OpenClipText, tokens, length):
    """What the tower pools, read before its projection."""
    plain = copy.deepcopy(text)
    plain.tower.text_projection = None
    return plain(tokens, length).pooled


@pytest.mark.parametrize("kind", KINDS)
def test_without_what_it_sees_it_is_the_text_tower(kind):
    text, fusion = made(kind)
    image_tokens, image, tokens, length = pairs()
    assert not torch.equal(fusion(image_tokens, image, tokens, length), unprojected(text, tokens, length))
    for look in fusion.look:
        nn.init.zeros_(look.out.weight)  # type: ignore[union-attr]
        nn.init.zeros_(look.out.bias)  # type: ignore[union-attr]
    blind = fusion(image_tokens, image, tokens, length)
    assert torch.equal(blind, unprojected(text, tokens, length))
    assert blind.shape == (len(tokens), WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_tower_says_what_it_said(kind):
    _, _, tokens, length = pairs()
    before = tower_of(kind).double()(tokens, length)
    after = made(kind)[0](tokens, length)
    assert torch.equal(before.pooled, after.pooled)
    assert torch.equal(before.tokens, after.tokens)


def reference(text: OpenClipText, fusion: Fusion, image_tokens, tokens):
    """One pair (P, Dv), (T,) without padding, block by block as BLIP's med.py goes, by torch's attention."""
    tower: Any = text.tower
    x = (tower.token_embedding(tokens) + tower.positional_embedding[: len(tokens)])[None]
    mask = nn.Transformer.generate_square_subsequent_mask(len(tokens), dtype=x.dtype)
    seen = fusion.image_norm(image_tokens)[None]
    for i, block in enumerate(tower.transformer.resblocks):
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        if i % fusion.every == 0:
            read: Any = fusion.read[i // fusion.every]
            look: Any = fusion.look[i // fusion.every]
            attention: Any = nn.MultiheadAttention(WIDTH, look.heads, batch_first=True).double()
            attention.in_proj_weight.data = torch.cat([look.query.weight, torch.eye(WIDTH), torch.eye(WIDTH)])
            attention.in_proj_bias.data = torch.cat([look.query.bias, torch.zeros(2 * WIDTH)])
            attention.out_proj = look.out
            key, value = read(seen).chunk(2, -1)
            x = x + attention(look.norm(x), key, value, need_weights=False)[0]
        x = x + block.mlp(block.ln_2(x))
    return tower.ln_final(x)[0, -1]


@pytest.mark.parametrize(("every", "heads", "looks"), [(1, 0, 3), (2, 4, 2), (5, 1, 1)])
def test_it_is_blips_encoder(every, heads, looks):
    text, fusion = made(every=every, heads=heads)
    assert len(fusion.look) == looks
    image_tokens, image, tokens, length = pairs()
    states = fusion(image_tokens, image, tokens, length)
    for row in range(len(tokens)):
        alone = reference(text, fusion, image_tokens[image[row]], tokens[row, : length[row]])
        torch.testing.assert_close(states[row], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    _, fusion = made(kind)
    image_tokens, image, tokens, length = pairs()
    states = fusion(image_tokens, image, tokens, length)
    longer = nn.functional.pad(tokens, (0, 3), value=7)
    torch.testing.assert_close(fusion(image_tokens, image, longer, length), states, rtol=0, atol=1e-12)
    for row in range(len(tokens)):
        alone = tokens[row : row + 1, : length[row]]
        state = fusion(image_tokens, image[row : row + 1], alone, length[row : row + 1])
        torch.testing.assert_close(state[0], states[row], rtol=0, atol=1e-12)


def test_the_image_is_seen_and_no_other():
    _, fusion = made()
    image_tokens, image, tokens, length = pairs()
    states = fusion(image_tokens, image, tokens, length)
    for changed in range(IMAGES):
        other = image_tokens.clone()
        other[changed] += torch.randn(PATCHES, IMAGE_WIDTH, dtype=torch.float64)
        difference = (fusion(other, image, tokens, length) - states).abs().amax(1)
        assert (difference[image == changed] > 1e-6).all()
        assert (difference[image != changed] == 0).all()


def test_an_image_is_read_once_however_many_texts_go_with_it(monkeypatch):
    _, fusion = made()
    image_tokens, image, tokens, length = pairs()
    rows = []
    for read in fusion.read:
        read.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    shared = fusion(image_tokens, image, tokens, length)
    assert rows == [IMAGES] * LAYERS
    own = fusion(image_tokens[image], torch.arange(len(image)), tokens, length)
    torch.testing.assert_close(shared, own, rtol=0, atol=1e-12)


def test_gradient_reaches_the_shared_tower_the_image_and_the_cross_attention():
    text, fusion = made()
    image_tokens, image, tokens, length = pairs()
    image_tokens.requires_grad_()
    fusion(image_tokens, image, tokens, length).square().sum().backward()
    assert image_tokens.grad is not None
    assert (image_tokens.grad.abs().amax((1, 2)) > 0).tolist() == [True, True, False, True]
    unread = {name for name, weight in text.named_parameters() if weight.grad is None}
    assert unread == {"tower.text_projection"}
    for name, weight in fusion.named_parameters():
        # The bias of keys moves every score of a query alike, so it has no gradient.
        gradient = weight.grad
        assert gradient is not None
        if name.startswith("read") and name.endswith("bias"):
            gradient = gradient[WIDTH:]
        assert (gradient.abs() > 0).any(), name


def test_parameters_are_the_text_towers_own_once():
    text, fusion = made()
    names = {name for name, _ in fusion.named_parameters()}
    assert {name.partition(".")[0] for name in names} == {"image_norm", "read", "look"}
    assert not {id(each) for each in text.parameters()} & {id(each) for each in fusion.parameters()}
    assert text.state_dict().keys() == tower_of("end").state_dict().keys()


# open_clip's scaled attention takes no empty batch, with an image or without.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scaled blocks"])
@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("columns", [0, 4])
def test_no_pairs_have_no_states_but_a_graph(kind, images, columns):
    _, fusion = made(kind)
    image_tokens = torch.randn(images, PATCHES, IMAGE_WIDTH, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    states = fusion(image_tokens, none, torch.zeros(0, columns, dtype=torch.long), none)
    assert states.shape == (0, WIDTH)
    states.sum().backward()
    assert all(weight.grad is None or (weight.grad == 0).all() for weight in fusion.parameters())


@pytest.mark.parametrize("length", [1, 12])
def test_texts_of_any_length_that_fits(length):
    _, fusion = made()
    image_tokens, image, tokens, lengths = pairs(lengths=(length,), image=(2,))
    assert fusion(image_tokens, image, tokens, lengths).isfinite().all()


def test_heads_divide_the_text_towers_width():
    with pytest.raises(UserError, match=r"--model\.fusion\.heads is 3; it must divide .* width, which is 16"):
        made(heads=3)


def test_a_tower_of_transformers_has_none():
    text = HubText.__new__(HubText)
    nn.Module.__init__(text)
    assert build_fusion(Fusion.Config(), text=text, image_width=IMAGE_WIDTH) is None


def test_the_small_tower_of_the_default_run_has_one():
    text = build_small_text(
        vocabulary=40, width=WIDTH, layers=1, heads=2, context_length=12, embed=10, end_id=END
    )
    fusion = build_fusion(Fusion.Config(), text=text, image_width=IMAGE_WIDTH)
    assert fusion is not None
    image_tokens, image, tokens, length = pairs()
    assert fusion(image_tokens.float(), image, tokens, length).shape == (len(image), WIDTH)
