"""FLOPs are those of a formula by hand, what is run again is known as such, and counting changes nothing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from datasets.batch import Batch
from pretrain.distributed import Ranks
from pretrain.flops import AGAIN, Counter, StepFlops, counting, matmul_peak
from pretrain.parallel import wrap
from pretrain.precision import Compute
from pretrain.step import Setup, agree, backward
from pretrain.stopwatch import Stopwatch
from pretrain.testing import make_samples, merge, split, tiny_pretrainer
from pretrain.zoo.head import VocabularyHead
from pretrain.zoo.models import OpenClipConfig, build_model, own_tokenizer

CPU = torch.device("cpu")
COMPUTE = Compute(device=CPU, bf16=False)
ALONE = Ranks(rank=0, world=1, device=CPU, group=None)


def transformer(*, tokens: int, width: int, layers: int) -> int:
    """Multiply-adds of a forward over one sequence: q k v o and an MLP of 4, scores and their use."""
    return layers * (12 * tokens * width**2 + 2 * tokens**2 * width)


def test_a_clip_step_has_the_flops_of_the_formula():
    """open_clip's ViT-S-32 over 77 tokens: 16.96 GFLOP a sample, forward and backward."""
    image = 49 * 3 * 32**2 * 384 + transformer(tokens=50, width=384, layers=12) + 384 * 384
    text = transformer(tokens=77, width=384, layers=12) + 384 * 384
    # The first convolution has no gradient at the pixels.
    by_hand = 2 * (3 * (image + text) - 49 * 3 * 32**2 * 384)
    config = OpenClipConfig(name="ViT-S-32")
    tokenizer = own_tokenizer(config)
    assert tokenizer is not None
    model = build_model(config, tokenizer=tokenizer, resolution=224, temperature=(10.0, None))
    counter, tokens = Counter(), torch.full((2, 77), 7)
    with COMPUTE.forward(), counting(counter, "forward"):
        images = model.encode_image(torch.zeros(2, 3, 224, 224, dtype=torch.uint8))["image"]
        total = (images * model.encode_text(tokens, torch.full((2,), 77))["text"]).sum()
    with counting(counter, "backward"):
        total.backward()
    assert sum(counter.counts.values()) / 2 == pytest.approx(by_hand, rel=0.002)
    assert sum(counter.counts.values()) / 2 == pytest.approx(16.96e9, rel=0.01)
    assert counter.counts["backward"] / counter.counts["forward"] == pytest.approx(2, rel=0.02)


def test_torch_counts_the_same_in_one_whole():
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(3, 5, 16)
    with FlopCounterMode(display=False) as whole:
        layer(x).sum().backward()
    counter = Counter()
    with counting(counter, "forward"):
        out = layer(x).sum()
    with counting(counter, "backward"):
        out.backward()
    assert sum(counter.counts.values()) == whole.get_total_flops() > 0


def test_the_vocabulary_head_is_seen_inside_its_own_function():
    M, D, V = 30, 8, 50
    head, states = VocabularyHead(nn.Parameter(torch.randn(V, D))), torch.randn(M, D, requires_grad=True)
    counter = Counter()
    with counting(counter, "forward"):
        loss, *_ = head(states, torch.zeros(M, dtype=torch.int64), smoothing=0.1, z_loss=1e-4)
    with counting(counter, "backward"):
        loss.backward()
    assert dict(counter.counts) == {"forward": 3 * 2 * M * D * V}, "its gradients are made in the forward"


def test_a_recomputed_forward_is_counted_apart():
    block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Tanh())
    x = torch.randn(4, 8, requires_grad=True)
    once = 2 * 2 * 4 * 8 * 16
    counter = Counter()
    with counting(counter, "forward"):
        out = checkpoint(block, x, use_reentrant=False)
    with counting(counter, "backward"):
        out.sum().backward()
    assert dict(counter.counts) == {"forward": once, "backward": 2 * once, AGAIN: once}


def counted(kinds: tuple[str, ...], micro_batches: int) -> dict[str, int]:
    """FLOPs of a tiny step by part."""
    pretrainer = tiny_pretrainer(kinds)
    counter = Counter()
    counter.watch_again(pretrainer)
    setup = Setup(
        wrapped=wrap(pretrainer, ALONE), compute=COMPUTE, watch=lambda part: counting(counter, part)
    )
    batches = split(make_samples(16), ALONE, micro_batches)
    counts = agree(setup, batches).counts
    backward(setup, batches, {name: 1.0 / count for name, count in counts.items()}, key=(0, 0))
    return dict(counter.counts)


def test_coupled_micro_batches_encode_again_and_that_is_no_work_of_the_model():
    whole, cut = counted(("itc",), 1), counted(("itc",), 4)
    assert AGAIN not in whole
    assert 0 < cut[AGAIN] < cut["forward"]
    assert cut["forward"] == pytest.approx(whole["forward"], rel=0.25), "but for the texts' own lengths"
    assert counted(("lm",), 4).keys() == {"forward", "backward"}, "nothing couples them"


def step_of(images: int, tokens: int, words: int, source: str = "web", side: int = 8) -> list[Batch]:
    """A micro-batch of these sizes; what stands in it does not matter."""
    batch = merge(make_samples(1))
    length = torch.zeros(images, dtype=torch.int64)
    length[0] = words
    shaped = {
        "images": torch.zeros(images, 3, side, side, dtype=torch.uint8),
        "tokens": torch.zeros(images, tokens, dtype=torch.int64),
        "text_length": length,
        "source": source,
    }
    return [Batch(**{name: shaped.get(name, getattr(batch, name)) for name in Batch.__slots__})]


def true_flops(batches: list[Batch]) -> int:
    """Of a made-up model."""
    return sum(
        1000 * len(b.images) * b.images.shape[2] ** 2
        + 500 * b.tokens.numel()
        + 3 * b.tokens.shape[0] * b.tokens.shape[1] ** 2
        + 70 * int(b.text_length.sum())
        for b in batches
    )


def test_after_a_few_shapes_the_others_are_known():
    known, looked = StepFlops(), []
    for step in range(400):
        batches = step_of(32, 6 + step * 7 % 11, 200 + step * 13 % 50)
        if known.wants(batches):
            known.learn(batches, true_flops(batches))
            looked.append(step)
        if step > 3:
            assert known.of(batches) == pytest.approx(true_flops(batches), rel=0.005)
    assert looked[:4] == [0, 1, 2, 3]
    assert len(looked) <= 6, "four, and one for every 200 steps"
    batches = step_of(32, 9, 210, side=16)
    assert known.wants(batches), "a resolution of which nothing is known"
    assert known.wants(step_of(32, 9, 210, source="other"))


def test_where_code_is_compiled_for_a_shape_it_is_counted_when_it_comes_again():
    known = StepFlops(sights=2)
    assert [known.wants(step_of(4, tokens, 8)) for tokens in (5, 6, 5, 6)] == [False, False, True, True]
    assert known.of(step_of(4, 5, 8)) == 0, "nothing was taken in"


def train(stopwatch: Stopwatch) -> list[torch.Tensor]:
    """The parameters after three steps of a model with dropout."""
    from pretrain.step import train_step

    pretrainer = tiny_pretrainer(("itc", "lm"), dropout=0.2)
    stopwatch.attach(pretrainer)
    setup = Setup(wrapped=wrap(pretrainer, ALONE), compute=COMPUTE, watch=stopwatch)
    optimizer = torch.optim.AdamW(pretrainer.parameters(), lr=1e-2)
    for step in range(3):
        batches = split(make_samples(12, seed=step), ALONE, 2)
        counts = agree(setup, batches).counts
        with stopwatch.step(batches):
            train_step(
                setup,
                batches,
                optimizer,
                counts=counts,
                weights={"itc": 1.0, "lm": 1.0},
                largest_norm=1.0,
                key=(0, step),
            )
    return [parameter.detach() for parameter in pretrainer.parameters()]


def test_counting_changes_no_bit():
    seen, unseen = Stopwatch(CPU), Stopwatch(CPU, flops=StepFlops(sights=100))
    for one, other in zip(train(seen), train(unseen), strict=True):
        assert torch.equal(one, other)
    assert seen.take()["flops"] > 0
    assert unseen.take()["flops"] == 0


def test_the_peak_is_measured_without_touching_the_random_state():
    before = torch.get_rng_state()
    assert matmul_peak(COMPUTE) > 1e9
    assert torch.equal(before, torch.get_rng_state())
