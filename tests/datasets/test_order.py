from collections import Counter
from hashlib import blake2b
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.errors import UserError
from datasets.order import VERSION, Order, Shuffle, Slot, share

EPOCHS = st.integers(0, 10**6)


@st.composite
def orders(draw, longest=3000):
    """Any finite order: fewer samples than lanes, windows of one sample, runs of many."""
    size = draw(st.integers(1, 40) | st.integers(1, longest))
    lanes = draw(st.integers(1, 9))
    window = draw(st.integers(lanes, lanes + 20) | st.integers(lanes, 2 * longest) | st.just(1 << 19))
    return Order(draw(st.integers()), size, draw(st.text(max_size=4)), lanes=lanes, window=window)


def epoch_of(order, epoch):
    return [order[epoch * order.size + place] for place in range(order.size)]


def indices(order, epoch=0):
    return [slot.index for slot in epoch_of(order, epoch)]


def lane_of_each(order):
    """The lane of every place of an epoch, by dealing places to the lanes that still have a row."""
    cuts = [lane * order.size // order.lanes for lane in range(order.lanes + 1)]
    lengths = [end - begin for begin, end in pairwise(cuts)]
    return [lane for row in range(max(lengths)) for lane in range(order.lanes) if row < lengths[lane]]


def lanes_at(order, positions):
    lanes = lane_of_each(order)
    return [lanes[position % order.size] for position in positions]


def lengths_of(order):
    """Samples of each lane."""
    lanes = Counter(lane_of_each(order))
    return [lanes[lane] for lane in range(order.lanes)]


def cuts_of(order, length):
    """Where the windows of a lane of some length begin and end."""
    windows = -(-length * order.lanes // order.window)
    return [window * length // windows for window in range(windows + 1)] if length else [0]


def longest_window(order, length):
    return max((last - first for first, last in pairwise(cuts_of(order, length))), default=0)


def portion(order, start, stop, *, rank, ranks, micro_batches):
    """What one rank reads of a global batch, micro-batch by micro-batch."""
    mine = share(stop - start, rank, ranks)
    positions = order.batch(start, stop)[mine.start : mine.stop]
    parts = [share(len(positions), part, micro_batches) for part in range(micro_batches)]
    return [[order[position] for position in positions[part.start : part.stop]] for part in parts]


def global_batch(order, step, batch, ranks=1, micro_batches=1):
    """The samples of a step in the order of ranks and micro-batches."""
    start, stop = step * batch, (step + 1) * batch
    return [
        slot
        for rank in range(ranks)
        for part in portion(order, start, stop, rank=rank, ranks=ranks, micro_batches=micro_batches)
        for slot in part
    ]


# What stands where


@settings(deadline=None)
@given(order=orders(), epoch=EPOCHS)
def test_every_sample_stands_once_in_every_epoch(order, epoch):
    slots = epoch_of(order, epoch)
    assert sorted(slot.index for slot in slots) == list(range(order.size))
    assert {slot.epoch for slot in slots} == {epoch}


@settings(deadline=None)
@given(
    position=st.integers(0, 10**15),
    size=st.integers(1, 10**12),
    lanes=st.integers(1, 64),
    window=st.integers(64, 1 << 24),
)
def test_huge_epochs_need_no_table(position, size, lanes, window):
    slot = Order(7, size, lanes=lanes, window=window)[position]
    assert slot.epoch == position // size
    assert 0 <= slot.index < size


def test_endless_source_is_read_in_its_own_order():
    order = Order(3, None)
    assert [order[p] for p in (0, 1, 10**12)] == [Slot(0, 0), Slot(0, 1), Slot(0, 10**12)]
    assert order.batch(5, 9) == [5, 6, 7, 8]
    assert order.ahead(5) is None


def test_position_before_the_start_is_refused():
    with pytest.raises(AssertionError):
        Order(0, 5)[-1]


@settings(deadline=None)
@given(order=orders(300), batch=st.integers(1, 100), epochs=st.integers(1, 3))
def test_batches_repeat_nothing_and_an_epoch_goes_on_into_the_next(order, batch, epochs):
    steps = epochs * order.size // batch
    slots = [slot for step in range(steps) for slot in global_batch(order, step, batch)]
    assert len(set(slots)) == len(slots) == steps * batch
    for epoch in range(epochs):
        read = {slot.index for slot in slots if slot.epoch == epoch}
        assert len(read) == min(order.size, max(0, steps * batch - epoch * order.size))
    assert all(0 <= slot.index < order.size for slot in slots)


# Who reads it


@settings(deadline=None)
@given(total=st.integers(0, 300), ranks=st.integers(1, 9), micro_batches=st.integers(1, 5))
def test_shares_of_shares_join_up(total, ranks, micro_batches):
    places = []
    for rank in range(ranks):
        mine = share(total, rank, ranks)
        assert total // ranks <= len(mine) <= -(-total // ranks)
        places += [mine[i] for micro in range(micro_batches) for i in share(len(mine), micro, micro_batches)]
    assert places == list(range(total))


@settings(deadline=None)
@given(
    order=orders(300),
    batch=st.integers(1, 100),
    steps=st.integers(1, 12),
    every=st.integers(1, 5),
    starts=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6)), max_size=6),
)
def test_kills_and_other_ranks_change_no_global_batch(order, batch, steps, every, starts):
    """A run of one number, the step: killed after some steps, it goes on from its last checkpoint."""
    straight = [global_batch(order, step, batch) for step in range(steps)]
    saved, ledger = 0, {}
    for ranks, micro_batches, lived in [*starts, (1, 1, steps)]:
        for step in range(saved, min(saved + lived, steps)):
            ledger[step] = global_batch(order, step, batch, ranks, micro_batches)
            if (step + 1) % every == 0:
                saved = step + 1
    assert [ledger[step] for step in range(steps)] == straight


@settings(deadline=None)
@given(order=orders(300), start=st.integers(0, 2000), length=st.integers(1, 700))
def test_a_batch_holds_its_positions_lane_by_lane(order, start, length):
    positions = order.batch(start, start + length)
    assert sorted(positions) == list(range(start, start + length))
    standing = list(zip(lanes_at(order, positions), positions, strict=True))
    assert standing == sorted(standing)


@settings(deadline=None)
@given(order=orders(2000), epoch=st.integers(0, 9), data=st.data())
def test_a_rank_reads_few_lanes(order, epoch, data):
    """Only its own, where ranks divide lanes, lanes divide the batch and the epoch does not end in it."""
    whole_rows = order.size // order.lanes * order.lanes
    ranks = data.draw(st.sampled_from([n for n in range(1, 10) if order.lanes % n == 0]))
    start = data.draw(st.integers(0, whole_rows))
    length = data.draw(st.integers(0, whole_rows - start))
    positions = order.batch(epoch * order.size + start, epoch * order.size + start + length)
    for rank in range(ranks):
        own = share(order.lanes, rank, ranks)
        mine = share(length, rank, ranks)
        lanes = lanes_at(order, positions[mine.start : mine.stop])
        foreign = sum(lane not in own for lane in lanes)
        assert foreign <= length % order.lanes


# How it is shuffled


def spots_of(order, epoch):
    """The indices of an epoch before the shuffling within windows, lane by lane, as `ahead` names them."""
    lengths = lengths_of(order)
    early = [longest_window(order, length) for length in lengths]
    spots = [[] for _ in lengths]
    for asking in (epoch - 1, epoch):
        rows = [asking * length for length in lengths]
        for place, lane in enumerate(lane_of_each(order)):
            if epoch * lengths[lane] <= rows[lane] + early[lane] < (epoch + 1) * lengths[lane]:
                spots[lane].append(order.ahead(asking * order.size + place))
            rows[lane] += 1
    return spots


def rows_of(order, epoch):
    """The indices of an epoch as they are read, lane by lane."""
    rows = [[] for _ in range(order.lanes)]
    for lane, slot in zip(lane_of_each(order), epoch_of(order, epoch), strict=True):
        rows[lane].append(slot.index)
    return rows


@settings(deadline=None)
@given(order=orders(), epoch=st.integers(0, 99))
def test_a_sample_stays_in_its_lane_and_window(order, epoch):
    for spots, rows in zip(spots_of(order, epoch), rows_of(order, epoch), strict=True):
        assert sorted(spots) == sorted(rows)
        for first, last in pairwise(cuts_of(order, len(spots))):
            assert 0 < last - first <= -(-order.window // order.lanes)
            assert sorted(spots[first:last]) == sorted(rows[first:last])


@settings(deadline=None)
@given(order=orders(), epoch=st.integers(0, 99))
def test_neighbours_are_fetched_together(order, epoch):
    """Lanes before shuffling are runs of neighbours in the manifest, cut where two lanes meet."""
    joined = [index for spots in spots_of(order, epoch) for index in spots]
    run = max(1, min(64, min(order.window, order.size) // (order.lanes * 128)))
    breaks = [place for place, (a, b) in enumerate(pairwise(joined), 1) if b != a + 1]
    assert len(breaks) <= -(-order.size // run)
    lengths = [end - begin for begin, end in pairwise([0, *breaks, order.size])]
    assert sum(length % run != 0 for length in lengths) <= 1  # the short last one, wherever it stands


@settings(deadline=None)
@given(order=orders(), first=st.integers(0, 99))
def test_everything_is_asked_for_once_and_before_its_window_begins(order, first):
    """Over the borders of epochs too: the head of the next epoch is asked for in the tail of this one."""
    lanes = lane_of_each(order)
    asked = [[] for _ in range(order.lanes)]  # of a lane: indices by row, rows counted over three epochs
    read = [[] for _ in range(order.lanes)]
    for position in range(first * order.size, (first + 3) * order.size):
        lane = lanes[position % order.size]
        asked[lane].append(order.ahead(position))
        read[lane].append(order[position].index)
    for lane, length in enumerate(lengths_of(order)):
        early = longest_window(order, length)
        for start in (length, 2 * length):  # what stands in the first epoch is asked for before it
            row_asked = {asked[lane][row - early]: row - early for row in range(start, start + length)}
            assert row_asked.keys() == set(read[lane][start : start + length])
            for first_row, end_row in pairwise(cuts_of(order, length)):
                for row in range(start + first_row, start + end_row):
                    asking = row_asked[read[lane][row]]
                    assert asking < start + first_row
                    assert row - asking < 2 * early


def test_a_small_source_is_asked_for_one_epoch_early():
    order = Order(5, 100)
    assert [order.ahead(position) for position in range(100)] != indices(order, 1)
    assert {order.ahead(position) for position in range(100)} == set(range(100))


def test_epochs_seeds_names_sizes_lanes_and_windows_are_shuffled_apart():
    size = 20_000
    first = indices(Order(0, size))
    others = [
        indices(Order(0, size), 1),
        indices(Order(1, size)),
        indices(Order(0, size, "captions")),
        indices(Order(0, size, "boxes")),
        indices(Order(0, size + 1)),
        indices(Order(0, size, lanes=4)),
        indices(Order(0, size, window=8192)),
    ]
    for place, one in enumerate([first, *others]):
        for other in [first, *others][place + 1 :]:
            assert sum(a == b for a, b in zip(one, other, strict=False)) < 30  # few are expected by chance


def test_every_arrangement_of_four_is_about_as_likely():
    trials = 24 * 500
    for lanes in (1, 2, 8):
        seen = Counter(tuple(indices(Order(seed, 4, lanes=lanes))) for seed in range(trials))
        chi_square = sum((seen[p] - 500) ** 2 / 500 for p in permutations(range(4)))
        assert chi_square < 60  # 23 degrees of freedom: 23 expected, 60 has probability 3e-5


@pytest.mark.parametrize("lanes", [1, 8])
def test_neighbours_are_spread(lanes):
    """Consecutive places land on unrelated samples: the mean distance of a random shuffle is size / 3."""
    size = 5000
    read = indices(Order(0, size, lanes=lanes), 3)
    gaps = [abs(a - b) for a, b in pairwise(read)]
    assert 0.32 < sum(gaps) / len(gaps) / size < 0.347


def test_sorted_classes_are_mixed():
    """Stored class by class, every batch of 256 has the classes as often as a full shuffle would give."""
    size, classes, batch = 50_000, 10, 256
    labels = np.array(indices(Order(0, size))) * classes // size
    counts = [np.bincount(part, minlength=classes) for part in np.split(labels[: 195 * batch], 195)]
    chi_square = ((np.array(counts) - batch / classes) ** 2).sum(1) / (batch / classes)
    assert 8 < chi_square.mean() < 10  # 9 expected, with a standard deviation of 0.3
    assert (chi_square > 21.67).mean() < 0.035  # the upper 1 %: 2 of 195 expected, 7 has probability 3e-3


# What may never change

GOLDEN = {
    Order(0, 10): "df9a7a902d575fc05b315d75d8215b81",
    Order(-7, 3_001, "captions", lanes=3, window=700): "c2d9839c48e3cc93832114f55a5ab01e",
    Order(1, 70_001, "a", lanes=1): "3aba125a58a836e943e602ef60365585",
    Order(2**70, 1_500_000_000, lanes=8): "25b28e5451078d8ce71c63db24477b65",
    Order(3, 10**12, "boxes", lanes=64, window=1 << 22): "7e4adf29071851c4a9e41f8320637076",
}


@pytest.mark.parametrize(("order", "golden"), GOLDEN.items())
def test_order_never_changes(order, golden):
    """A run that is resumed with another release must read the same: else VERSION changes, and these."""
    assert VERSION == 2
    digest = blake2b(digest_size=16)
    for start in (0, order.size // 2, 7 * order.size - 5, 2**40):
        positions = order.batch(start, start + 700)
        slots = [order[position] for position in positions]
        digest.update(repr([(slot.epoch, slot.index) for slot in slots]).encode())
    assert digest.hexdigest() == golden


def test_a_few_places_to_read():
    assert indices(Order(0, 10)) == [9, 1, 7, 8, 5, 0, 4, 6, 2, 3]
    assert Order(1, 1_500_000_000)[2_000_000_000] == Slot(1, 393053226)


# What a user may choose


@pytest.mark.parametrize("shuffle", [Shuffle(lanes=0), Shuffle(lanes=8, window=7)])
def test_what_cannot_be_shuffled_is_refused(shuffle):
    with pytest.raises(UserError, match=r"--data\.(lanes|window)"):
        shuffle.check("--data")
