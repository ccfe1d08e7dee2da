"""One pool of ranks for the whole session, and one thread: the suite runs beside others."""

import os
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
os.environ["WANDB_MODE"] = "disabled"  # the tests of the mirror say otherwise


@pytest.fixture(autouse=True)
def _same_arithmetic():
    """A launch chooses the CPU's fast float32 path for its process; the next test is another process."""
    matmul: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = matmul.fp32_precision
    yield
    matmul.fp32_precision = before


@pytest.fixture(scope="session")
def pool():
    from pretrain.testing import RankPool

    pool = RankPool()
    yield pool
    pool.close()
