from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from datasets.order import RUN
from datasets.remote.runs import Runs
from datasets.shards.sidecar import Place


class Listed:
    """Samples of two members each, laid out by a list of gaps."""

    def __init__(self, sizes, apart):
        self.bytes = 0
        count = len(sizes)
        self.rows: list[list[Place]] = [[] for _ in sizes]
        turns = range(2 * count)
        for turn in turns:
            row = turn % count if apart else turn // 2
            self.rows[row].append(Place(self.bytes + 512, sizes[row], 0))
            self.bytes += 512 + sizes[row]

    def __len__(self):
        return len(self.rows)

    def extent(self, first, last):
        places = [place for row in self.rows[first:last] for place in row]
        if not places:
            return 0, 0
        return min(place.offset for place in places), max(place.offset + place.size for place in places)


@given(
    sizes=st.lists(st.integers(0, 40_000), min_size=1, max_size=300),
    first=st.integers(0, 1000),
    apart=st.booleans(),
    piece=st.sampled_from([1 << 16, 1 << 20, 1 << 26]),
)
def test_pieces_hold_their_places(sizes, first, apart, piece):
    """Whole, in order, within the shard, not longer than a piece, and those of their run if they can."""
    import datasets.remote.runs as module

    before, module.PIECE = module.PIECE, piece
    try:
        table = Listed(sizes, apart)
        runs = Runs(table, first)  # pyright: ignore[reportArgumentType]
        for row, places in enumerate(table.rows):
            own = list(runs.pieces((first + row) // RUN))
            for place in places:
                held = runs.holding(place)
                end = place.offset + place.size
                if place.size:
                    assert held[0][0] <= place.offset
                    assert held[-1][1] >= end
                assert all(left[1] == right[0] for left, right in pairwise(held))
                assert all(0 <= begin < stop <= table.bytes and stop - begin <= piece for begin, stop in held)
                if not apart and place.size:
                    assert set(held) <= set(own)
    finally:
        module.PIECE = before


def test_a_run_is_one_piece_of_its_members():
    runs = Runs(Listed([100] * 100, apart=False), first=30)  # pyright: ignore[reportArgumentType]
    one, two, three = (list(runs.pieces(run)) for run in range(3))
    assert one == [(512, 34 * 2 * 612)]
    assert two == [(34 * 2 * 612 + 512, 98 * 2 * 612)]
    assert three == [(98 * 2 * 612 + 512, 100 * 2 * 612)]


@given(holes=st.sets(st.integers(0, 9), max_size=9), first=st.integers(0, 200))
def test_runs_without_members_hide_no_others(holes, first):
    table = Listed([100] * 10 * RUN, apart=False)
    for row in range(len(table)):
        if (first + row) // RUN - first // RUN in holes:
            table.rows[row] = []
    runs = Runs(table, first)  # pyright: ignore[reportArgumentType]
    for row, places in enumerate(table.rows):
        own = list(runs.pieces((first + row) // RUN))
        assert bool(own) == bool(places)
        assert all(runs.holding(place) == own for place in places)
