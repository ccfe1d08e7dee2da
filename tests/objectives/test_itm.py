"""Image-text matching against its formula, and what it draws."""

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from datasets.batch import Batch
from objectives.base import IMAGE, TEXT, Pairs, Widths
from objectives.itm import ITM
from pretrain.distributed import Ranks
from pretrain.testing import make_samples, merge, split

PLAIN = Widths(embed=6, image_tokens=8, text_tokens=5, vocabulary=20, temperature=False, contrast=False)
BESIDE_CONTRAST = Widths(
    embed=6, image_tokens=8, text_tokens=5, vocabulary=20, temperature=False, contrast=True
)


@dataclass(eq=False)
class Given:
    """Encodings that are known; what is fused is a fixed function of image and text."""

    batch: Batch
    image: torch.Tensor
    text: torch.Tensor
    group: Any = None
    key: tuple[int, ...] = (0, 0)
    logit_scale = torch.tensor([2.0], dtype=torch.float64)
    logit_bias = None

    def __getitem__(self, wanted):
        return {IMAGE: self.image, TEXT: self.text}[wanted]

    def fused(self, pairs: Pairs) -> torch.Tensor:
        image = self.batch.images[pairs.image].double().flatten(1).mean(1, keepdim=True)
        places = torch.arange(1, 6, dtype=torch.float64)
        return ((pairs.tokens.double().sum(1, keepdim=True) + image) * places).sin()

    def vocabulary_loss(self, states, targets, *, smoothing, z_loss):
        raise AssertionError


def given_of(batch: Batch, seed: int = 0, **more: Any) -> Given:
    random = torch.Generator().manual_seed(seed)
    image, text = (
        F.normalize(torch.randn(len(rows), 6, generator=random, dtype=torch.float64), dim=-1)
        for rows in (batch.images, batch.tokens)
    )
    return Given(batch, image, text, **more)


def itm(widths: Widths = BESIDE_CONTRAST) -> ITM:
    torch.manual_seed(0)
    return ITM(ITM.Config(), widths).double()


def sentences(tokens: torch.Tensor, length: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(ids[:count].tolist()) for ids, count in zip(tokens, length, strict=True)]


def asked(batch: Batch, pairs: Pairs) -> list[tuple[int, int, bool]]:
    """(image, text, matched) of each pair by its place, of a batch in which no two texts are equal."""
    texts = {ids: place for place, ids in enumerate(sentences(batch.tokens, batch.text_length))}
    assert len(texts) == len(batch.tokens)
    read = [texts[ids] for ids in sentences(pairs.tokens, pairs.text_length)]
    return list(zip(pairs.image.tolist(), read, pairs.matched.tolist(), strict=True))


def test_the_loss_is_blips_given_the_negatives():
    """models/blip_pretrain.py: two-way cross-entropy over the pair, and over both negatives of each pair."""
    batch = merge(make_samples(23))
    encodings, objective = given_of(batch), itm()
    pairs = objective.draw(encodings, batch)
    said = objective(encodings, batch, pairs)

    two_way = nn.Linear(5, 2).double()
    with torch.no_grad():
        two_way.weight.copy_(torch.cat([torch.zeros_like(objective.head.weight), objective.head.weight]))
        two_way.bias.copy_(torch.cat([torch.zeros_like(objective.head.bias), objective.head.bias]))
    triples = asked(batch, pairs)
    valid = [(int(i), t) for t, i in enumerate(batch.image_index) if batch.pair_valid[t]]
    assert sorted((i, t) for i, t, matched in triples if matched) == sorted(valid)
    n = int(objective.denominator(batch))
    assert len(triples) == 3 * n
    output = two_way(encodings.fused(pairs))
    label = pairs.matched.long()
    assert said.total.item() / n == pytest.approx(F.cross_entropy(output, label).item(), rel=1e-12)
    right = (output.argmax(1) == label).sum()
    assert float(said.metrics["accuracy"]) == pytest.approx(float(right) / 3, rel=1e-12)
    assert float(said.metrics["trivial"]) == pytest.approx(2 * n / 3, rel=1e-12)
    assert float(said.metrics["missing"]) == pytest.approx(0, abs=1e-12)


def plain(images: int) -> Batch:
    """One text each, no two equal, nothing masked."""
    texts = torch.arange(images)
    return batch_of(image_index=texts.tolist(), text_id=texts.tolist(), masked=())


def batch_of(image_index, text_id, masked=()) -> Batch:
    """Every text has a word of its own; where `text_id` is equal it is said to be a known positive."""
    images, texts = max(image_index, default=-1) + 1, len(image_index)
    return Batch(
        images=torch.arange(images, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2),
        image_valid=torch.tensor([i not in masked for i in range(images)], dtype=torch.bool),
        tokens=torch.arange(3, 3 + texts)[:, None],
        text_length=torch.ones(texts, dtype=torch.int64),
        image_index=torch.tensor(image_index, dtype=torch.int64),
        text_valid=torch.tensor([i not in masked for i in image_index], dtype=torch.bool),
        text_id=torch.tensor(text_id, dtype=torch.int64),
        boxes=torch.zeros(texts, 4),
        box_valid=torch.zeros(texts, dtype=torch.bool),
        keys=tuple(map(str, range(images))),
        sample_id=torch.arange(100, 100 + images),
    )


@pytest.mark.parametrize("widths", [BESIDE_CONTRAST, PLAIN], ids=["hard", "even"])
def test_negatives_have_the_probabilities_of_the_similarity(widths):
    """Over 2,000 keys each pair is a negative as often as its text draws the image or the image the text."""
    batch, objective, keys, n = plain(7), itm(widths), 2_000, 7
    found = torch.zeros(n, n, dtype=torch.float64)
    for step in range(keys):
        encodings = given_of(batch, key=(0, step))
        for image, text, matched in asked(batch, objective.draw(encodings, batch)):
            found[image, text] += not matched
    encodings = given_of(batch)
    logits = (encodings.image @ encodings.text.T) * (encodings.logit_scale.exp() if objective.compares else 0)
    logits.fill_diagonal_(-torch.inf)
    by_text, by_image = logits.softmax(0), logits.softmax(1)
    variance = keys * (by_text * (1 - by_text) + by_image * (1 - by_image))
    off = ~torch.eye(n, dtype=torch.bool)
    apart = (found - keys * (by_text + by_image))[off] / variance[off].sqrt()
    assert float(apart.abs().max()) < 4
    assert float((apart**2).mean()) < 1.6
    assert not found.diagonal().any()
    if objective.compares:
        assert by_text[off].max() > 0.5  # and that is far from even


batches = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=0, max_size=12).flatmap(
    lambda texts: st.tuples(st.just(sorted(texts)), st.sets(st.integers(0, 5), max_size=3))
)


@given(batches, st.integers(0, 1000), st.sampled_from([BESIDE_CONTRAST, PLAIN]))
@settings(max_examples=150)
def test_no_known_positive_is_ever_a_negative(drawn, step, widths):
    """Several captions of an image, equal captions, masked images: counted out by a loop over all pairs."""
    texts, masked = drawn
    batch = batch_of([image for image, _ in texts], [word for _, word in texts], masked)
    objective = itm(widths)
    pairs = objective.draw(given_of(batch, key=(0, step)), batch)
    valid = [t for t, (image, _) in enumerate(texts) if image not in masked]

    readable = set(range(len(batch.images))) - masked

    def known(image: int, text: int) -> bool:
        return any(texts[t] == (image, texts[text][1]) for t in valid)

    def terms(t: int) -> int:
        """How many negatives there must be of a pair."""
        image = any(not known(each, t) for each in readable)
        return image + any(not known(texts[t][0], each) for each in valid)

    triples = asked(batch, pairs)
    negatives = [(image, text) for image, text, matched in triples if not matched]
    assert sorted((i, t) for i, t, matched in triples if matched) == sorted((texts[t][0], t) for t in valid)
    assert all(text in valid and image in readable and not known(image, text) for image, text in negatives)
    assert len(negatives) == sum(map(terms, valid))
    said = objective(given_of(batch), batch, pairs)
    assert float(said.metrics["missing"]) == pytest.approx(len(valid) - len(triples) / 3, abs=1e-6)
    assert said.total.isfinite()


@pytest.mark.parametrize("widths", [BESIDE_CONTRAST, PLAIN], ids=["hard", "even"])
def test_one_pair_alone_is_asked_about_once(widths):
    batch, objective = plain(1), itm(widths)
    pairs = objective.draw(given_of(batch), batch)
    assert asked(batch, pairs) == [(0, 0, True)]
    said = objective(given_of(batch), batch, pairs)
    assert float(said.metrics["missing"]) == pytest.approx(2 / 3)
    said.total.backward()
    assert objective.head.weight.grad is not None
    assert float(objective.head.weight.grad.abs().sum()) > 0


def test_nothing_to_read_is_a_sum_of_nothing_with_a_graph():
    batch, objective = batch_of([0, 1], [0, 1], masked=(0, 1)), itm()
    pairs = objective.draw(given_of(batch), batch)
    assert pairs.tokens.shape == (0, 2)
    said = objective(given_of(batch), batch, pairs)
    said.total.backward()
    assert float(said.total.detach()) == 0
    assert objective.head.weight.grad is not None


def test_the_logit_is_float32_whatever_autocast_says():
    objective = ITM(ITM.Config(), PLAIN)
    states = torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective.match_logit(states.bfloat16())
    torch.testing.assert_close(found, objective.match_logit(states.bfloat16().float()), rtol=0, atol=0)
    assert objective.bfloat16().match_logit(states.bfloat16()).dtype == torch.float32


def test_who_compares_nothing_says_so():
    assert itm(BESIDE_CONTRAST).remark == ""
    assert "drawn evenly" in itm(PLAIN).remark
    assert itm(PLAIN).coupled == ()
    assert itm(BESIDE_CONTRAST).coupled == (IMAGE, TEXT)


def moved(ranks: Ranks) -> tuple[int, int, int]:
    """The bytes of ids that a rank sends to others, those of all else, and how many ids it lacked."""
    batch = split(make_samples(30), ranks, 1)[0]
    sent = {"ids": 0, "rest": 0}
    exchange, collect = dist.all_to_all_single, dist.all_gather_into_tensor

    def counted_exchange(output, mine, receive, send, group):
        others = [rank for rank in range(ranks.world) if rank != ranks.rank]
        sent["ids"] += sum(send[rank] for rank in others) * mine.element_size()
        return exchange(output, mine, receive, send, group=group)

    def counted_collect(output, mine, group):
        sent["rest"] += mine.numel() * mine.element_size()
        return collect(output, mine, group=group)

    dist.all_to_all_single, dist.all_gather_into_tensor = counted_exchange, counted_collect
    try:
        pairs = itm(PLAIN).draw(given_of(batch, group=ranks.group), batch)
    finally:
        dist.all_to_all_single, dist.all_gather_into_tensor = exchange, collect
    read = set(sentences(pairs.tokens, pairs.text_length))
    lacked = read - set(sentences(batch.tokens, batch.text_length))
    return sent["ids"], sent["rest"], sum(map(len, lacked))


@pytest.mark.parametrize("world", [2, 4])
def test_only_ids_of_texts_that_are_read_elsewhere_move(pool, world):
    """Each once to each rank that reads it, 4 bytes an id; beside them some whole numbers of each text."""
    results = pool.run(moved, world)
    ids, rest, lacked = (sum(each) for each in zip(*results, strict=True))
    assert ids == 4 * lacked > 0
    texts = sum(len(sample.tokens) for sample in make_samples(30))
    # Of each text: image, word; two choices, length, name; name again as a column. Of each image: two.
    assert rest <= 8 * (8 * texts + 4 * 30) + 8 * 8 * world
