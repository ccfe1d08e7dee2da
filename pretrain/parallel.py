"""How the pretrainer is wrapped for several ranks, in the one place where it is wrapped."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from pretrain.distributed import Ranks
from pretrain.pretrainer import Pretrainer


class Wrapped:
    """A pretrainer of one process, and what wrapping may change about it."""

    def __init__(self, pretrainer: Pretrainer, ranks: Ranks) -> None:
        self.pretrainer = pretrainer
        self.ranks = ranks
        self.divided = 1
        """By how much the sum of the ranks' gradients is divided where they meet."""
        self._call: Callable[..., Any] = pretrainer

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The pretrainer's forward; see `Pretrainer.forward`."""
        return self._call(*arguments, **options)

    def synchronised(self, now: bool) -> AbstractContextManager[None]:
        """Whether ranks exchange gradients inside: on the last micro-batch only; the sum is the same."""
        del now
        return nullcontext()

    def piece(self, place: int) -> tuple[int, ...]:
        """What names this rank's micro-batch at a place, for the randomness inside the towers."""
        return self.ranks.rank, place


class Replicated(Wrapped):
    """DistributedDataParallel: every rank has all parameters.

    A batch need not reach every parameter (a source without images, a pooling head that only contrast
    reads), so unused ones must be found; buffers are constants and are not sent.
    """

    def __init__(self, pretrainer: Pretrainer, ranks: Ranks) -> None:
        super().__init__(pretrainer, ranks)
        self.divided = ranks.world
        with warnings.catch_warnings():
            # Deprecated in torch 2.15 in favour of a name that 2.11 does not know.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            self._call = self._ddp = DistributedDataParallel(
                pretrainer, process_group=ranks.group, find_unused_parameters=True, broadcast_buffers=False
            )

    def synchronised(self, now: bool) -> AbstractContextManager[None]:
        """DDP's own way to wait."""
        return nullcontext() if now else self._ddp.no_sync()


def wrap(pretrainer: Pretrainer, ranks: Ranks) -> Wrapped:
    """DDP over the ranks; nothing for one."""
    return Wrapped(pretrainer, ranks) if ranks.group is None else Replicated(pretrainer, ranks)
