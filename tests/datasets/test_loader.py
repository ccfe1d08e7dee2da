import threading
from collections import Counter
from dataclasses import fields
from itertools import islice
from typing import Any, Literal

import pytest
import torch

from datasets.draws import draws
from datasets.errors import UserError
from datasets.holding import Holding
from datasets.loader import Feed, Loader, Masked, evaluation_batches
from datasets.mixture import Account
from datasets.order import Order, Shuffle
from datasets.sample import Fault, Phrase, Sample
from datasets.source import EVERYTHING, Field
from datasets.tokens import TrainedBPE

TOKENIZER = TrainedBPE.train(["picture number 1"] * 3, vocabulary=280, context_length=16)


class Numbered:
    """Sample i shows i; every fifth is masked, and captions number 1 to 3."""

    name = "numbered"
    fields: frozenset[Field] = frozenset({"image", "text", "boxes"})
    fingerprint = "0"
    remote = False

    def __init__(self, size=None, *, error_at=None):
        self.size = size
        self.error_at = error_at
        self.read_at = []

    def read(self, index, *, seed, resolution, augment=None, fields=EVERYTHING):
        self.read_at.append(index)
        if index == self.error_at:
            raise OSError(f"disk gone at {index}")
        captions = tuple(f"picture number {index} {'again ' * i}" for i in range(1 + index % 3))
        phrases = tuple(Phrase(text=f"p{i}", box=(0, 0, 1, 1), caption=i) for i in range(len(captions)))
        noise = int(draws(*seed)[0] * 100) if augment else 0
        image = torch.full((3, resolution, resolution), (index + noise) % 256, dtype=torch.uint8)
        fault = Fault("corrupt", "every fifth") if index % 5 == 4 else None
        return Sample(key=f"n/{index}", image=image, captions=captions, phrases=phrases, fault=fault)

    def captions(self, index):
        return self.read(index, seed=(0,), resolution=1).captions

    def prefetch(self, index):
        raise AssertionError("nothing here is remote")


def loader(source=None, captions: Literal["one", "all"] = "one", **changes):
    settings: dict[str, Any] = {"seed": 1, "batch": 12, "resolution": 2} | changes
    feed = Feed(name="numbers", source=source or Numbered(50), holding=Holding(choose=captions))
    return Loader([feed], TOKENIZER, **settings)


def rows(batches):
    """What a list of batches says, sample by sample and free of padding."""
    said = []
    for batch in batches:
        for i, key in enumerate(batch.keys):
            mine = (batch.image_index == i).nonzero().flatten().tolist()
            texts = [(batch.tokens[n, : batch.text_length[n]].tolist(), int(batch.text_id[n])) for n in mine]
            said.append((key, bool(batch.image_valid[i]), batch.images[i].tolist(), texts))
    return said


@pytest.mark.parametrize("captions", ["one", "all"])
@pytest.mark.parametrize(
    ("ranks", "micro_batches", "threads"), [(1, 4, 1), (2, 1, 3), (3, 2, 2), (4, 3, 1), (5, 2, 4)]
)
def test_ranks_micro_batches_and_threads_do_not_change_what_is_read(captions, ranks, micro_batches, threads):
    whole = [rows(portion.batches) for portion in loader(captions=captions).steps(0, 9)]
    streams = [
        loader(captions=captions, rank=r, ranks=ranks, micro_batches=micro_batches, threads=threads).steps(
            0, 9
        )
        for r in range(ranks)
    ]
    for step, portions in enumerate(zip(*streams, strict=True)):
        assert {len(portion.batches) for portion in portions} == {micro_batches}
        assert rows([batch for portion in portions for batch in portion.batches]) == whole[step]


def test_threads_give_equal_tensors():
    for one, four in zip(loader().steps(0, 9), loader(threads=4).steps(0, 9), strict=True):
        for a, b in zip(one.batches, four.batches, strict=True):
            for field in fields(a):
                left, right = getattr(a, field.name), getattr(b, field.name)
                assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def test_a_step_reads_what_the_order_says():
    order = Order(1, 50, "numbers", lanes=4, window=24)
    portions = loader(shuffle=Shuffle(lanes=4, window=24)).steps(2, 6, accounts={"numbers": Account(7)})
    for step, portion in enumerate(portions):
        start = 7 + step * 12
        positions = order.batch(start, start + 12)
        assert sorted(positions) == list(range(start, start + 12))
        assert portion.batches[0].keys == tuple(f"n/{order[p].index}" for p in positions)
        assert portion.accounts == {"numbers": Account(start + 12)}
        assert (portion.step, portion.batches[0].source) == (2 + step, "numbers")


def test_starting_later_gives_the_same_steps():
    whole = list(loader().steps(0, 8))
    resumed = list(loader().steps(5, 8, accounts=whole[4].accounts))
    assert [p.step for p in resumed] == [5, 6, 7]
    assert [rows(p.batches) for p in resumed] == [rows(p.batches) for p in whole[5:]]


def test_epochs_are_whole_and_views_are_new():
    source = Numbered(50)
    said = [row for p in loader(source, batch=10).steps(0, 10) for row in rows(p.batches)]
    first, second = said[:50], said[50:]
    assert {key for key, *_ in first} == {key for key, *_ in second} == {f"n/{i}" for i in range(50)}
    views = {key: image for key, _, image, _ in first}
    assert sum(views[key] == image for key, valid, image, _ in second if valid) < 5


def test_one_caption_is_drawn_evenly_with_its_phrases():
    sample = Numbered().read(2, seed=(0,), resolution=2)
    seen = Counter()
    for epoch in range(600):
        drawn = Holding()(sample, (0, epoch, 2))
        assert [p.caption for p in drawn.phrases] == [0]
        assert drawn.phrases[0].text == f"p{sample.captions.index(drawn.captions[0])}"
        seen[drawn.captions] += 1
    assert len(seen) == 3
    assert min(seen.values()) > 150


def test_masked_samples_are_named():
    portion = next(loader(Numbered(), batch=12, rank=1, ranks=2).steps(0, 1))
    assert portion.masked == (Masked("numbers", 9, 0, "n/9", Fault("corrupt", "every fifth")),)
    assert portion.batches[0].image_valid.tolist() == [True] * 3 + [False] + [True] * 2


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_reading_ahead_is_bounded_and_closing_ends_the_threads():
    source = Numbered()
    steps = loader(source, threads=3).steps(0, 10**9)
    list(islice(steps, 4))
    assert readers()
    steps.close()
    assert not readers()
    assert max(source.read_at) < 12 * 12  # 4 taken, a few ahead


def test_error_in_a_thread_reaches_the_consumer():
    steps = loader(Numbered(error_at=40), threads=2).steps(0, 100)
    with pytest.raises(OSError, match="disk gone at 40"):
        list(steps)
    assert not readers()


def test_readers_compute_alone_and_leave_the_consumer_its_threads():
    seen, left = set(), []

    class Watching(Numbered):
        def read(self, index, **settings):
            seen.add(torch.get_num_threads())
            return super().read(index, **settings)

    def consume():  # a thread that has not asked torch for anything yet
        list(loader(Watching(50), threads=2).steps(0, 3))
        left.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        consumer = threading.Thread(target=consume)
        consumer.start()
        consumer.join()
    finally:
        torch.set_num_threads(before)
    assert seen == {1}
    assert left == [3]


def test_impossible_batches_are_refused():
    with pytest.raises(UserError, match="at least 16 samples"):
        loader(ranks=4, micro_batches=4)


def test_the_epoch_of_a_masked_sample_is_told():
    steps = loader(Numbered(10), batch=10, captions="all").steps(3, 5, accounts={"numbers": Account(30)})
    masked = [one for portion in steps for one in portion.masked]
    assert [(one.epoch, one.key) for one in masked if one.key == "n/4"] == [(3, "n/4"), (4, "n/4")]
    assert all(one.position // 10 == one.epoch for one in masked)


def test_evaluation_reads_in_order_with_all_captions():
    def read(source, **more):
        found = list(evaluation_batches(source, TOKENIZER, batch=4, resolution=2, **more))
        assert all([sample.key for sample in one.samples] == list(one.batch.keys) for one in found)
        return [one.batch for one in found]

    batches = read(Numbered(10))
    assert [len(batch.keys) for batch in batches] == [4, 4, 2]
    said = rows(batches)
    assert [key for key, *_ in said] == [f"n/{i}" for i in range(10)]
    assert [len(texts) for _, _, _, texts in said] == [1 if i % 5 == 4 else 1 + i % 3 for i in range(10)]
    assert all(image[0][0][0] == i for i, (_, valid, image, _) in enumerate(said) if valid)
    assert rows(read(Numbered(), limit=6)) == said[:6]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_share_the_batches_of_an_evaluation_and_no_boundary_moves(ranks):
    def read(**more):
        options = {"batch": 4, "resolution": 2, "threads": 3}
        return list(evaluation_batches(Numbered(18), TOKENIZER, **options, **more))

    parts = [one.batch for rank in range(ranks) for one in read(rank=rank, ranks=ranks)]
    assert [part.keys for part in parts] == [one.batch.keys for one in read()]
    assert all(torch.equal(a.images, b.batch.images) for a, b in zip(parts, read(), strict=True))
