"""A mixture's steps: exact shares, the same on any ranks, and resumed from the accounts at any step."""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from hashlib import blake2b
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.draws import draws
from datasets.errors import UserError
from datasets.holding import NEEDS, Holding
from datasets.loader import Feed, Loader
from datasets.order import Order, Shuffle
from datasets.sample import Fault, Phrase, Sample
from datasets.source import EVERYTHING
from datasets.tokens import TrainedBPE
from datasets.weights import Weight, weight_at

TOKENIZER = TrainedBPE.train(["picture number 1 of dogs"] * 3, vocabulary=280, context_length=24)
LANES, BATCH = 4, 24
HOLDS = {
    "pairs": Holding(choose="all"),
    "boxes": Holding(holds="phrases"),
    "books": Holding(holds="text"),
    "photos": Holding(holds="images"),
}
WEIGHTS: dict[str, Weight] = {
    "pairs": 5.0,
    "boxes": 0.3,  # less than a quantum a step
    "books": ((0, 4.0), (20, 0.0), (30, 2.0)),
    "photos": ((0, 0.0), (10, 1.0)),
}
SIZES = {"pairs": 61, "boxes": 24, "books": 50, "photos": 37}


class Drawn:
    """A source whose every answer follows from index and key; every ninth sample is masked."""

    fields = EVERYTHING
    remote = False

    def __init__(self, name, size):
        self.name = self.fingerprint = name
        self.size = size

    def read(self, index, *, seed, resolution, augment=None, fields=EVERYTHING):
        key = f"{self.name}/{index}"
        fault = Fault("corrupt", "every ninth") if index % 9 == 8 else None
        view = torch.Generator().manual_seed(int(draws(*seed)[0] * 2**32) if augment else 0)
        image = torch.randint(0, 256, (3, resolution, resolution), generator=view, dtype=torch.uint8)
        captions = tuple(f"{self.name} {index} {n}" for n in range(index % 4 or 1))
        phrases = tuple(Phrase(text=f"dog {n}", box=(0, 0, 1, (n + 1) / 9)) for n in range(index % 3))
        return Sample(
            key=key,
            image=image if "image" in fields else None,
            captions=captions if "text" in fields else (),
            phrases=phrases if "boxes" in fields else (),
            fault=fault,
        )

    def captions(self, index):
        return self.read(index, seed=(0,), resolution=1).captions

    def prefetch(self, index):
        raise AssertionError("nothing here is remote")


def loader(weights=WEIGHTS, sizes=SIZES, **changes):
    options: dict[str, Any] = {
        "seed": 3, "batch": BATCH, "resolution": 4, "shuffle": Shuffle(lanes=LANES, window=16),
    } | changes  # fmt: skip
    feeds = [
        Feed(name=name, source=Drawn(name, sizes[name]), holding=HOLDS[name], weight=weight)
        for name, weight in weights.items()
    ]
    return Loader(feeds, TOKENIZER, **options)


@dataclass(frozen=True)
class Said:
    """One sample as it stands in a batch, free of padding and of the place it has there."""

    key: str
    pixels: str
    texts: tuple[Any, ...]


def said(batches):
    """Of each source, its samples in order."""
    found: dict[str, list[Said]] = {}
    for batch in batches:
        with_images = len(batch.images) > 0
        assert with_images or (batch.image_index == -1).all()
        owners = batch.image_index.tolist() if with_images else range(len(batch.keys))
        rows = [
            (
                batch.tokens[n, : batch.text_length[n]].tolist(),
                int(batch.text_id[n]),
                bool(batch.text_valid[n]),
                batch.boxes[n].tolist(),
                bool(batch.box_valid[n]),
            )
            for n in range(len(batch.tokens))
        ]
        for place, key in enumerate(batch.keys):
            pixels = batch.images[place].numpy().tobytes() if with_images else b""
            valid = bool(batch.image_valid[place]) if with_images else None
            found.setdefault(batch.source, []).append(
                Said(
                    key,
                    f"{valid} {blake2b(pixels).hexdigest()}",
                    tuple(map(str, (row for row, owner in zip(rows, owners, strict=True) if owner == place))),
                )
            )
    return found


def whole(last, **changes):
    return list(loader(**changes).steps(0, last))


def test_each_source_gives_the_samples_of_its_own_order():
    """Every position once, without a gap, also across the end of its epoch."""
    used = dict.fromkeys(SIZES, 0)
    for portion in whole(40):
        for batch in portion.batches:
            order = Order(3, SIZES[batch.source], batch.source, lanes=LANES, window=16)
            start, stop = used[batch.source], used[batch.source] + len(batch.keys)
            expected = [f"{batch.source}/{order[p].index}" for p in order.batch(start, stop)]
            assert list(batch.keys) == expected
            used[batch.source] = stop
        assert used == {name: account.position for name, account in portion.accounts.items()}
    assert all(used[name] > SIZES[name] for name in SIZES)


@pytest.mark.parametrize("ranks", [1, 3])
def test_shares_are_exact_over_any_window_of_steps(ranks):
    """In whole quanta, and to within n - 1 of them over any window, on any number of ranks."""
    streams = [loader(rank=rank, ranks=ranks).steps(0, 60) for rank in range(ranks)]
    got: list[Counter[str]] = []
    for portions in zip(*streams, strict=True):
        counts = Counter[str]()
        for batch in (batch for portion in portions for batch in portion.batches):
            counts[batch.source] += len(batch.keys)
        assert counts.total() == BATCH
        assert all(count % LANES == 0 for count in counts.values())
        got.append(counts)
    for name in WEIGHTS:
        due = [Fraction(weight_at(WEIGHTS[name], step)) / total(step) * BATCH for step in range(60)]
        off = [Fraction(0)]
        for step in range(60):
            assert due[step] > 0 or not got[step][name]
            off.append(off[-1] + got[step][name] - due[step])
        assert max(off) - min(off) <= (len(WEIGHTS) - 1) * LANES
    assert {len(counts) for counts in got} >= {2, 3}  # what is due less than a quantum comes now and then


def total(step):
    return sum(Fraction(weight_at(weight, step)) for weight in WEIGHTS.values())


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "threads"), [(1, 3, 1), (2, 1, 3), (2, 2, 1), (3, 4, 2), (4, 2, 2)]
)
def test_ranks_micro_batches_and_threads_do_not_change_what_is_read(ranks, micro_batches, threads):
    """Source by source the ordered samples, their pixels, words and boxes."""
    options = {"ranks": ranks, "micro_batches": micro_batches, "threads": threads}
    streams = [loader(rank=rank, **options).steps(0, 25) for rank in range(ranks)]
    for alone, portions in zip(whole(25), zip(*streams, strict=True), strict=True):
        # The same sources in the same order, in as many pieces on each rank: collectives match.
        assert len({tuple(batch.source for batch in portion.batches) for portion in portions}) == 1
        assert all(len(batch.keys) for portion in portions for batch in portion.batches)
        assert said(batch for portion in portions for batch in portion.batches) == said(alone.batches)
        assert {str(portion.accounts) for portion in portions} == {str(alone.accounts)}
        faults = [one for portion in portions for one in portion.masked]
        assert sorted(faults, key=str) == sorted(alone.masked, key=str)


def test_five_ranks_take_more_lanes():
    options = {"shuffle": Shuffle(lanes=6, window=60), "batch": 24}
    streams = [loader(rank=rank, ranks=5, micro_batches=2, **options).steps(0, 12) for rank in range(5)]
    for alone, portions in zip(whole(12, **options), zip(*streams, strict=True), strict=True):
        assert said(batch for portion in portions for batch in portion.batches) == said(alone.batches)


@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_killed_and_resumed_at_any_steps_on_any_ranks_it_is_the_straight_run(data):
    """A chain of starts, each with ranks, micro-batches and threads of its own, from the accounts before."""
    straight, step, accounts = straight_run(), 0, None
    while step < LAST:
        last = data.draw(st.integers(step + 1, LAST), label="killed before")
        ranks = data.draw(st.integers(1, 4), label="ranks")
        settings = {"ranks": ranks, "micro_batches": data.draw(st.integers(1, 3)), "threads": ranks}
        streams = [
            loader(rank=rank, **settings).steps(step, LAST, accounts=accounts) for rank in range(ranks)
        ]
        for portions in islice(zip(*streams, strict=True), last - step):
            assert {portion.step for portion in portions} == {step}
            expected = said(straight[step].batches)
            assert said(batch for portion in portions for batch in portion.batches) == expected
            accounts = portions[0].accounts
            assert accounts == straight[step].accounts
            step += 1
        for stream in streams:
            stream.close()


LAST = 18


@cache
def straight_run():
    return whole(LAST)


def test_texts_alone_have_no_images_and_images_alone_no_texts():
    seen = set[str]()
    for portion in whole(25):
        for batch in portion.batches:
            seen.add(batch.source)
            count, fields = len(batch.keys), NEEDS[HOLDS[batch.source].holds]
            assert batch.images.shape == (count if "image" in fields else 0, 3, 4, 4)
            if batch.source == "books":
                assert batch.image_index.tolist() == [-1] * count
                assert batch.text_valid.sum() == sum(map(valid, batch.keys))
            elif batch.source == "photos":
                assert not batch.text_valid.any()  # of a masked slot stays an empty text
                assert len(batch.tokens) == sum(not valid(key) for key in batch.keys)
            elif batch.source == "boxes":
                assert torch.equal(batch.box_valid, batch.text_valid)
                assert (batch.boxes[batch.text_valid][:, 3] > 0).all()
    assert seen == set(WEIGHTS)


def valid(key):
    return int(key.partition("/")[2]) % 9 != 8


def test_one_source_needs_no_lanes_and_several_do():
    alone = {"pairs": 1.0}
    assert len(next(loader(alone, batch=23).steps(0, 1)).batches[0].keys) == 23
    assert len(next(loader(alone, ranks=7, rank=6).steps(0, 1)).batches[0].keys) == 4
    with pytest.raises(UserError, match=r"batch of 23 .* among 4 sources .*lanes 4: make the batch"):
        loader(batch=23)
    with pytest.raises(UserError, match=r"parts of --shuffle\.lanes 4, too few for 5 ranks"):
        loader(ranks=5)
