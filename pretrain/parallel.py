"""How the pretrainer is wrapped for several ranks, in the one place where it is wrapped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from datasets.batch import Batch
from objectives.base import Pass, Terms
from pretrain.distributed import Ranks
from pretrain.pretrainer import Pretrainer
from pretrain.sums import add_terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Circled:
    """What the objectives of a circle see, and where in it this rank's own rows begin."""

    given: Mapping[Pass, Tensor]
    """The encodings."""
    batch: Batch
    """What they are of."""
    first_image: int = 0
    first_text: int = 0


class Wrapped:
    """A pretrainer of one process, and what wrapping may change about it."""

    def __init__(self, pretrainer: Pretrainer, ranks: Ranks) -> None:
        self.pretrainer = pretrainer
        self.ranks = ranks
        self.divided = 1
        """By how much the sum of the ranks' gradients is divided where they meet."""
        self.lends_pull = True
        """Whether the gradients of circles at parameters go through the last micro-batch's backward."""
        self.always_circles = False
        """Whether a micro-batch that is alone on its rank is coupled as several are."""
        self._call: Callable[..., Any] = pretrainer

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The pretrainer's forward; see `Pretrainer.forward`."""
        return self._call(*arguments, **options)

    def synchronised(self, now: bool) -> AbstractContextManager[None]:
        """Whether ranks exchange gradients inside: on the last micro-batch only; the sum is the same."""
        del now
        return nullcontext()

    def ordered(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """This rank's micro-batches in the order in which they are worked through."""
        return batches

    def piece(self, place: int, places: int) -> tuple[int, ...]:
        """What names this rank's micro-batch at one of its places, for the randomness inside the towers."""
        del places
        return self.ranks.rank, place

    def circled(self, given: Mapping[Pass, Tensor], joined: Batch) -> Circled:
        """What a circle of this rank's micro-batches is to see."""
        return Circled(given=given, batch=joined)

    def pushed(self, place: int, places: int) -> None:
        """The micro-batch at a place has given its gradient."""

    def finish(self, pull: Mapping[str, Tensor]) -> None:
        """All micro-batches have given their gradients; `pull` is that of circles at parameters."""

    def add_up(
        self, together: Sequence[Mapping[str, Terms]], apart: Sequence[Mapping[str, Terms]]
    ) -> dict[str, Tensor]:
        """() float64 sums over all ranks of what circles and micro-batches said, by name."""
        sums = add_terms([*together, *apart])
        total = self.ranks.sum(torch.stack([value.double() for value in sums.values()]))
        return dict(zip(sums, total.unbind(), strict=True))


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
