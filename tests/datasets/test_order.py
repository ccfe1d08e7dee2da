from collections import Counter
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.order import Order, Slot, share


def epoch_of(order, epoch):
    return [order[epoch * order.size + place] for place in range(order.size)]


@given(seed=st.integers(), size=st.integers(1, 400), epoch=st.integers(0, 10**6))
def test_every_sample_stands_once_in_every_epoch(seed, size, epoch):
    slots = epoch_of(Order(seed, size), epoch)
    assert sorted(slot.index for slot in slots) == list(range(size))
    assert {slot.epoch for slot in slots} == {epoch}


@given(position=st.integers(0, 10**15), size=st.integers(1, 10**12))
def test_huge_epochs_need_no_table(position, size):
    slot = Order(7, size)[position]
    assert slot.epoch == position // size
    assert 0 <= slot.index < size


def test_endless_source_is_read_in_its_own_order():
    order = Order(3, None)
    assert [order[p] for p in (0, 1, 10**12)] == [Slot(0, 0), Slot(0, 1), Slot(0, 10**12)]


def test_order_never_changes():
    """Golden values: a run that is resumed with another release must read the same samples."""
    assert [slot.index for slot in epoch_of(Order(0, 10), 0)] == [8, 2, 9, 5, 1, 4, 3, 0, 6, 7]
    assert Order(1, 1_500_000_000)[2_000_000_000] == Slot(1, 1077205726)


def test_epochs_seeds_and_sizes_are_shuffled_apart():
    size = 1000
    first = [s.index for s in epoch_of(Order(0, size), 0)]
    others = [epoch_of(Order(0, size), 1), epoch_of(Order(1, size), 0), epoch_of(Order(0, size + 1), 0)]
    for other in ([s.index for s in slots] for slots in others):
        assert sum(a == b for a, b in zip(first, other, strict=False)) < 10  # one is expected by chance


def test_every_arrangement_of_four_is_about_as_likely():
    trials = 24 * 500
    seen = Counter(tuple(s.index for s in epoch_of(Order(seed, 4), 0)) for seed in range(trials))
    chi_square = sum((seen[p] - 500) ** 2 / 500 for p in permutations(range(4)))
    assert chi_square < 60  # 23 degrees of freedom: 23 expected, 60 has probability 3e-5


def test_neighbours_are_spread():
    """Consecutive places land on unrelated samples: the mean distance of a random shuffle is size / 3."""
    size = 5000
    indices = [s.index for s in epoch_of(Order(0, size), 3)]
    gaps = [abs(a - b) for a, b in pairwise(indices)]
    assert 0.32 < sum(gaps) / len(gaps) / size < 0.347


@given(total=st.integers(0, 300), ranks=st.integers(1, 9), micro_batches=st.integers(1, 5))
def test_shares_of_shares_join_up(total, ranks, micro_batches):
    places = []
    for rank in range(ranks):
        mine = share(total, rank, ranks)
        assert total // ranks <= len(mine) <= -(-total // ranks)
        places += [mine[i] for micro in range(micro_batches) for i in share(len(mine), micro, micro_batches)]
    assert places == list(range(total))


def test_position_before_the_start_is_refused():
    with pytest.raises(AssertionError):
        Order(0, 5)[-1]
