"""How a pretrainer is spread over processes and memory, in the one place where it is wrapped.

The order, which is that of `wrap`, and of who calls it:

    1. frozen: what does not train is marked so, and parameters are rounded to what they are kept in
    2. activation checkpointing, of each block's forward
    3. torch.compile, of each block's forward with its checkpointing
    4. sharded block by block, or replicated
    5. the optimizer is built on the parameters as they are now
    6. a checkpoint is read into both

Each step finds what the one before has made: what is compiled includes what is computed twice, FSDP2 gathers
around both, and the optimizer sees shards. No step changes the name of a parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datasets.batch import Batch
from datasets.errors import UserError
from objectives.base import Pass, Terms
from pretrain.blocks import blocks_of, compile_each, glances_of, recompute
from pretrain.distributed import Ranks
from pretrain.pretrainer import Pretrainer
from pretrain.sums import add_terms


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a run is spread over processes and memory. It changes no mathematics."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes, each has all parameters (ddp), or a part of each (fsdp: FSDP2)."""
    shard: Literal["node", "all"] = "node"
    """fsdp: parameters are shared among the processes of a machine and repeated on every machine, or shared
    among all."""
    offload: bool = False
    """fsdp: parameters, gradients and moments wait in host memory, where the optimizer runs. On a CPU they
    are there anyway."""
    activation_checkpointing: bool = False
    """Keep only the input of each block of a tower, and compute the rest again in the backward."""
    compile: bool = False
    """torch.compile each block of a tower; needs a C++ compiler. A resumed run compiles for the shapes that
    it meets then: its samples are the same, its last bits may not be."""

    def check(self, optimizers: Mapping[str, str], *, elastic: bool) -> None:
        """Refuse what does not go together.

        Args:
            optimizers: kind of each stage's optimizer.
            elastic: whether gradients are added up in one order on any number of processes.

        Raises:
            UserError: names the flag.
        """
        if elastic and self.compile:
            raise UserError(
                "--deterministic elastic and --compile do not go together: what is compiled follows from the "
                "shapes that a process has met, and its bits with it; leave one out"
            )
        if self.parallel == "fsdp":
            if elastic:
                raise UserError(
                    "--deterministic elastic adds up whole gradients, and --parallel fsdp leaves each "
                    "process a part of them: choose one"
                )
            for stage, kind in optimizers.items():
                if kind == "muon":
                    raise UserError(
                        f"--stages.{stage}.optim.kind muon needs whole matrices, and --parallel fsdp leaves "
                        "each process a part of them: take adamw, or --parallel ddp"
                    )
            return
        for flag, given in {"--offload": self.offload, "--shard all": self.shard == "all"}.items():
            if given:
                raise UserError(f"{flag} is about shards, and --parallel ddp has none: add --parallel fsdp")


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
        self.micro_batches: int | None = None
        """Into how many a rank's part of a source has to be cut; None for as many as the stage says."""
        self._call: Callable[..., Any] = pretrainer

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The pretrainer's forward; see `Pretrainer.forward`."""
        return self._call(*arguments, **options)

    def synchronised(self, now: bool) -> AbstractContextManager[None]:
        """Whether ranks exchange gradients inside: on the last micro-batch only; the sum is the same."""
        del now
        return nullcontext()

    def whole(self) -> AbstractContextManager[None]:
        """Inside, all parameters are here, and parts of the model may be run one by one (evaluation).

        With shards this takes the memory of the whole model, though not of its gradients and moments. Every
        rank enters and leaves together; inside it is on its own.
        """
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
            self._call = self.ddp = DistributedDataParallel(
                pretrainer, process_group=ranks.group, find_unused_parameters=True, broadcast_buffers=False
            )

    def synchronised(self, now: bool) -> AbstractContextManager[None]:
        """DDP's own way to wait."""
        return nullcontext() if now else self.ddp.no_sync()


def same_on_all(module: nn.Module, ranks: Ranks) -> None:
    """Give every rank what rank zero begins with, as DDP does: processors may differ in how they draw."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, group=ranks.group, group_src=0)


def wrap(
    pretrainer: Pretrainer,
    ranks: Ranks,
    spread: Spread | None = None,
    *,
    bf16: bool = False,
    lanes: int | None = None,
) -> Wrapped:
    """Spread a pretrainer; the order is that of this module's docstring.

    Args:
        pretrainer: on this rank's device; changed in place.
        ranks: one process needs no wrapper.
        spread: how; DDP and nothing else by default.
        bf16: whether forwards run under bf16 autocast.
        lanes: of an elastic run (`pretrain.elastic`).

    Raises:
        UserError: one process cannot be spread as it says.
    """
    spread = spread or Spread()
    blocks = blocks_of(pretrainer.model)
    if spread.activation_checkpointing:
        recompute(blocks)
    if spread.compile:
        compile_each(blocks)
    if lanes is not None:
        from pretrain.elastic import Elastic

        return Elastic(pretrainer, ranks, lanes=lanes)
    if ranks.group is None:
        if spread.offload:
            raise UserError(
                "--offload is for the shards of several processes, and this is one: leave it out, or start "
                "more with torchrun"
            )
        return Wrapped(pretrainer, ranks)
    if spread.parallel == "fsdp":
        from pretrain.sharded import Sharded

        units = [*glances_of(pretrainer.model), *blocks]
        return Sharded(pretrainer, ranks, units=units, spread=spread, bf16=bf16)
    return Replicated(pretrainer, ranks)
