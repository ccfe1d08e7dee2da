import torch

from objectives.gather import Rows, count_rows
from pretrain.distributed import Ranks

ROWS = [3, 1, 0, 2]


def gathered(ranks: Ranks, transposed: bool) -> tuple[list[float], list[float]]:
    """Each rank holds ROWS[rank] rows; the loss weighs every row by its place and by the rank that asks."""
    rows = torch.full((ROWS[ranks.rank], 2), ranks.rank + 1.0, dtype=torch.float64, requires_grad=True)
    layout = count_rows(len(rows), ranks.group, ranks.device)
    everyone = layout.gather(rows)
    places = torch.arange(1.0, len(everyone) + 1, dtype=torch.float64)
    loss = (everyone * places[:, None]).sum() * (ranks.rank + 1)
    if transposed:  # a gradient that is not contiguous in memory
        loss = (everyone.T @ torch.outer(places, torch.ones(2, dtype=torch.float64))).trace() * (
            ranks.rank + 1
        )
    loss.backward()
    assert rows.grad is not None
    return everyone[:, 0].tolist(), rows.grad[:, 0].tolist()


def test_rows_of_all_ranks_in_order_and_the_gradient_is_the_sum_over_ranks(pool):
    for transposed in (False, True):
        for world in (1, 2, 4):
            results = pool.run(gathered, world, transposed=transposed)
            values = [float(rank + 1) for rank in range(world) for _ in range(ROWS[rank])]
            factor = sum(range(1, world + 1))
            gradient = [place * factor for place in range(1, len(values) + 1)]
            for rank, (seen, mine) in enumerate(results):
                first = sum(ROWS[:rank])
                assert seen == values
                assert mine == gradient[first : first + ROWS[rank]]


def test_a_row_of_all_ranks_knows_its_owner():
    layout = Rows((3, 1, 0, 2), 0, None)
    rank, place = layout.owner(torch.tensor([[0, 2, 3], [4, 5, 1]]))
    assert rank.tolist() == [[0, 0, 1], [3, 3, 0]]
    assert place.tolist() == [[0, 2, 0], [0, 1, 1]]
