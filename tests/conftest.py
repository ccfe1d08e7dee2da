"""One pool of ranks for the whole session, and one thread: the suite runs beside others."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# The first backward decides which devices get threads: were it one on paper, no fork could go backward.
torch.ones((), requires_grad=True).backward()
# A busy machine is no fault of the code.
settings.register_profile("medley", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("medley")
os.environ["WANDB_MODE"] = "disabled"  # the tests of the mirror say otherwise


_MATMUL: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
_AT_START = _MATMUL.fp32_precision


@pytest.fixture(autouse=True)
def _same_arithmetic():
    """A launch, also one of a module's fixtures, chooses the CPU's fast float32 path for its process."""
    _MATMUL.fp32_precision = _AT_START


@pytest.fixture(autouse=True)
def _same_draws():
    """Whichever tests have run before it in this process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """What is indexed or fetched here is no one else's. The list of fonts stays: making it takes seconds."""
    os.environ.setdefault("MPLCONFIGDIR", str(Path("~/.cache/matplotlib").expanduser()))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def pool():
    from pretrain.testing import RankPool

    pool = RankPool()
    yield pool
    pool.close()
