"""What rank zero does alone ends on all ranks in the same way."""

import pytest

from datasets.errors import UserError
from pretrain.distributed import RankZeroFailedError, SaidByRankZeroError


def outcome(ranks, kind):
    def work():
        if kind == "mistake":
            raise UserError("write it differently")
        if kind == "crash":
            raise KeyError("no such thing")
        return 7

    try:
        return ranks.on_zero(work)
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize(
    ("kind", "zero", "others"),
    [
        ("nothing", 7, 7),
        (
            "mistake",
            (UserError.__name__, "write it differently"),
            (SaidByRankZeroError.__name__, "write it differently"),
        ),
        (
            "crash",
            (KeyError.__name__, "'no such thing'"),
            (RankZeroFailedError.__name__, "KeyError: 'no such thing'"),
        ),
    ],
)
def test_every_rank_hears_what_became_of_what_rank_zero_did(pool, kind, zero, others):
    assert pool.run(outcome, 2, kind=kind) == [zero, others]
