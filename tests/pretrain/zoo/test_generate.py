import pytest
import torch

from pretrain.zoo.captioner import Captioner
from pretrain.zoo.generate import greedy, sample_top_p, top_p

START, END = 1, 2


@pytest.fixture
def captioner():
    torch.manual_seed(0)
    config = Captioner.Config(width=16, layers=2, heads=2)
    made = Captioner(config, image_width=12, vocabulary=12, context_length=9).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


@pytest.fixture
def images():
    return torch.randn(40, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def uncached(captioner, image):
    """One image, every token from a fresh forward over the whole text."""
    text = [START]
    while len(text) <= captioner.context_length:
        states = captioner(image[None], torch.tensor([text]))
        token = int(captioner.head.logits(states[0, -1]).argmax())
        if token == END:
            break
        text.append(token)
    return text[1:]


def test_greedy_is_what_uncached_forwards_say(captioner, images):
    found = greedy(captioner, images, start=START, end=END)
    assert found == [uncached(captioner, image) for image in images]
    lengths = {len(text) for text in found}
    assert len(lengths) > 2
    assert max(lengths) <= 9
    assert all(END not in text for text in found)


def test_longest_bounds_the_text(captioner, images):
    full = greedy(captioner, images, start=START, end=END)
    assert greedy(captioner, images, start=START, end=END, longest=3) == [text[:3] for text in full]


def test_no_images_no_captions(captioner, images):
    assert greedy(captioner, images[:0], start=START, end=END) == []


def test_all_may_end_at_once(captioner, images):
    with torch.no_grad():
        captioner.head.weight.zero_()
        captioner.head.weight[END] = 1
        captioner.norm.weight.zero_()
        captioner.norm.bias.fill_(1)
    assert greedy(captioner, images, start=START, end=END) == [[]] * 40


def test_top_p_of_nearly_nothing_is_greedy(captioner, images):
    sampled = top_p(
        captioner, images, start=START, end=END, p=1e-9, generator=torch.Generator().manual_seed(0)
    )
    assert sampled == greedy(captioner, images, start=START, end=END)


def test_one_seed_one_sample(captioner, images):
    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return top_p(captioner, images, start=START, end=END, p=0.9, generator=generator)

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.3, [0, 1.0, 0, 0]),
        (0.5, [0, 1.0, 0, 0]),
        (0.51, [0, 0.5 / 0.8, 0.3 / 0.8, 0]),
        (0.9, [0.15 / 0.95, 0.5 / 0.95, 0.3 / 0.95, 0]),
        (1.0, [0.15, 0.5, 0.3, 0.05]),
    ],
)
def test_top_p_draws_from_the_fewest_tokens_that_reach_p(p, expected):
    logits = torch.tensor([0.15, 0.5, 0.3, 0.05], dtype=torch.float64).log().expand(40_000, 4)
    drawn = sample_top_p(logits, p=p, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / 40_000
    torch.testing.assert_close(share, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0.01)
    assert (share[torch.tensor(expected) == 0] == 0).all()
