"""How the pretrainer is wrapped for several ranks, in the one place where it is wrapped."""

from __future__ import annotations

import warnings

from torch.nn.parallel import DistributedDataParallel

from pretrain.distributed import Ranks
from pretrain.pretrainer import Pretrainer
from pretrain.step import Wrapped


def wrap(pretrainer: Pretrainer, ranks: Ranks) -> Wrapped:
    """DDP over the ranks; nothing for one.

    A batch need not reach every parameter (a source without images, a pooling head that only contrast reads),
    so unused ones must be found; buffers are constants and are not sent.
    """
    if ranks.group is None:
        return pretrainer
    with warnings.catch_warnings():
        # Deprecated in torch 2.15 in favour of a name that 2.11 does not know.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(
            pretrainer, process_group=ranks.group, find_unused_parameters=True, broadcast_buffers=False
        )
