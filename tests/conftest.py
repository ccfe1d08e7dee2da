"""One pool of ranks for the whole session, and one thread: the suite runs beside others."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool():
    from pretrain.testing import RankPool

    pool = RankPool()
    yield pool
    pool.close()
