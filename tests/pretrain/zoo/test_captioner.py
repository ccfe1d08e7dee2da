import pytest
import torch
from torch.nn import functional as F

from pretrain.zoo.attention import attend
from pretrain.zoo.captioner import Captioner

CONFIG = Captioner.Config(width=16, layers=2, heads=2)


@pytest.fixture
def captioner():
    torch.manual_seed(0)
    made = Captioner(CONFIG, image_width=12, vocabulary=20, context_length=9).double()
    for parameter in made.parameters():  # so that no part is too small to be seen
        torch.nn.init.normal_(parameter, std=0.4)
    return made


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, 5, 12, dtype=torch.float64, generator=generator)
    return image, torch.randint(20, (3, 7), generator=generator)


def test_states_have_a_shape_and_see_the_image(captioner, inputs):
    image, tokens = inputs
    states = captioner(image, tokens)
    assert states.shape == (3, 7, 16)
    other = captioner(image.roll(1, 0), tokens)
    assert ((states - other).abs().amax(-1) > 1e-6).all()


def test_what_comes_later_cannot_be_seen(captioner, inputs):
    image, tokens = inputs
    states = captioner(image, tokens)
    for t in range(7):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 20
        difference = (captioner(image, changed) - states).abs().amax((0, 2))
        assert (difference[:t] == 0).all()
        assert (difference[t:] > 1e-6).all()


def test_shorter_texts_have_the_same_states(captioner, inputs):
    image, tokens = inputs
    states = captioner(image, tokens)
    torch.testing.assert_close(captioner(image, tokens[:, :4]), states[:, :4], rtol=0, atol=1e-12)


def test_the_cache_changes_nothing(captioner, inputs):
    image, tokens = inputs
    whole = captioner(image, tokens)
    cache = captioner.start(image)
    steps = [captioner.extend(tokens[:, t : t + 1], cache=cache) for t in range(7)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-12)
    assert cache.length == 7
    cache = captioner.start(image)
    first = captioner.extend(tokens[:, :4], cache=cache)
    rest = [captioner.extend(tokens[:, t : t + 1], cache=cache) for t in range(4, 7)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, rtol=0, atol=1e-12)


def test_the_image_is_looked_at_once(captioner, inputs, monkeypatch):
    image, tokens = inputs
    looks = []
    for block in captioner.blocks:
        monkeypatch.setattr(block, "look", lambda x, look=block.look: looks.append(1) or look(x))
    cache = captioner.start(image)
    for t in range(7):
        captioner.extend(tokens[:, t : t + 1], cache=cache)
    assert len(looks) == CONFIG.layers


def test_without_an_image_it_is_a_causal_language_model(captioner, inputs):
    """As if every look at the image said nothing: equal states, equal gradients, and none for the look."""
    image, tokens = inputs
    looking = ("image_norm", "look_kv", "query.", "cross_norm", "cross_out")
    states = captioner(None, tokens)
    assert not torch.allclose(states, captioner(image, tokens))
    states.square().sum().backward()
    alone = {name: parameter.grad for name, parameter in captioner.named_parameters()}
    assert {name for name, grad in alone.items() if grad is None} == {
        name for name in alone if any(part in name for part in looking)
    }
    captioner.zero_grad()
    with torch.no_grad():
        for block in captioner.blocks:
            block.cross_out.weight.zero_()
            block.cross_out.bias.zero_()
    blind = captioner(image, tokens)
    torch.testing.assert_close(states, blind, rtol=0, atol=1e-12)
    blind.square().sum().backward()
    for name, parameter in captioner.named_parameters():
        if alone[name] is not None:
            torch.testing.assert_close(alone[name], parameter.grad, rtol=0, atol=1e-9, msg=name)
    cache = captioner.start(None)
    steps = [captioner.extend(tokens[:, t : t + 1], cache=cache) for t in range(7)]
    torch.testing.assert_close(torch.cat(steps, 1), states, rtol=0, atol=1e-12)


def test_a_block_is_its_formula(captioner, inputs):
    image, tokens = inputs
    block = captioner.blocks[0]
    x = F.embedding(tokens, captioner.head.weight) + captioner.position[:7]
    seen = captioner.image_norm(image)

    def attend(query, key, value, mask):
        query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (query, key, value))
        scores = query @ key.transpose(-1, -2) / 8**0.5 + mask
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    causal = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)
    query, key, value = block.qkv(block.self_norm(x)).chunk(3, -1)
    y = x + block.self_out(attend(query, key, value, causal))
    key, value = block.look_kv(seen).chunk(2, -1)
    y = y + block.cross_out(attend(block.query(block.cross_norm(y)), key, value, 0))
    y = y + block.down(F.gelu(block.up(block.norm(y))))
    found, _ = block(x, cross=block.look(seen), past=None)
    torch.testing.assert_close(found, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_that_of_the_fused_kernel(causal):
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(3, 2, 7, 8, dtype=torch.float64, generator=generator) for _ in range(3)]
    query, key, value = parts
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    torch.testing.assert_close(attend(query, key, value, causal=causal), expected, rtol=0, atol=1e-12)


def test_every_parameter_learns(captioner, inputs):
    captioner(*inputs).square().sum().backward()
    for name, parameter in captioner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_batch_without_texts_is_no_trouble(captioner):
    states = captioner(torch.zeros(0, 5, 12, dtype=torch.float64), torch.zeros(0, 7, dtype=torch.int64))
    assert states.shape == (0, 7, 16)
