"""One optimizer step of a run on paper: its operations, its bytes, and what it sends."""

from __future__ import annotations

import warnings
from collections import Counter as Sums
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from datasets.batch import Batch
from datasets.tokens import Tokenizer
from objectives.as_on import as_on
from objectives.base import Objective
from pretrain.build import build_pretrainer, train_only
from pretrain.clipping import by_part, clip, gradient_norms
from pretrain.config import Run
from pretrain.costs import TOWERS
from pretrain.distributed import Ranks
from pretrain.flops import Counter, counting
from pretrain.optim import build_optimizer
from pretrain.parallel import Replicated, Wrapped, wrap
from pretrain.plan.held import Held
from pretrain.plan.paper import Collective, Paper, pretended
from pretrain.precision import Compute, keep_in_bf16
from pretrain.pretrainer import Pretrainer
from pretrain.step import Setup, agree, backward
from pretrain.zoo.head import VocabularyHead
from pretrain.zoo.towers import Encoded

Make = Callable[[Paper], Sequence[Batch]]
"""A rank's micro-batches of a step."""
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What steps are tried with."""

    run: Run
    stage: str
    tokenizer: Tokenizer
    feeds: Mapping[str, Sequence[str]]
    """Of each source, the objectives that see it."""
    world: int
    per_node: int
    parallel: Literal["ddp", "fsdp"]
    kind: str
    """Of device, cpu or cuda: which kernels are chosen."""
    bf16: bool
    """Whether forwards run under autocast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Of one rank, in one step."""

    flops: Mapping[str, int]
    """By part: `forward`, `backward`, and `again` for what runs a second time to save memory."""
    bytes: Mapping[str, int]
    """Alive at the moment when most is, by cause; the optimizer's moments are there already."""
    sent: Mapping[tuple[str, str], int]
    """By cause (`gradients`, `parameters`, `features`) and way (`node`, `network`)."""
    parts: Mapping[str, tuple[int, int]]
    """Parameters of the whole model, and those of them that train, by part."""
    image_tokens: int
    """Of one image; 0 where none is read."""
    kept: Mapping[str, int]
    """Bytes of the whole model's `weights`, `moments` and moving `average`, as a checkpoint has them."""

    @property
    def peak(self) -> int:
        """Bytes alive at once."""
        return sum(self.bytes.values())


class Trial:
    """A model on paper, built and spread once, of which steps are run. It lives inside one `pretended`."""

    def __init__(self, setting: Setting) -> None:
        """Build it, and let the optimizer make what it keeps.

        Raises:
            UserError: the model cannot be built, or not on paper.
        """
        self._setting, self._held, self._paper = setting, Held(), Paper()
        run, held = setting.run, self._held
        stage = run.stages[setting.stage]
        with self._on_paper() as group:
            local = min(setting.world, setting.per_node)
            ranks = Ranks(rank=0, world=setting.world, device=_CPU, group=group, local=local)
            with held.making("weights"):
                pretrainer = build_pretrainer(run, setting.tokenizer, ranks, load=False, feeds=setting.feeds)
                self._paper.rewrite(pretrainer)
                multipliers = train_only(pretrainer, run, setting.stage)
                if run.precision.parameters == "bf16":
                    keep_in_bf16(pretrainer)
            self._parts, whole = by_part(pretrainer), _bytes(pretrainer.parameters())
            self._wrapped = _spread(setting, pretrainer, ranks, held)
            self._optimizer = build_optimizer(pretrainer, stage.optim, multipliers)
            _warm(pretrainer, self._optimizer, held)
            with held.making("average"):
                self._average = [each.clone() for each in _locals(pretrainer, trained=True) if stage.ema]
            shards = _bytes(_locals(pretrainer))
            moments, copies = (round(held.by[kept] * whole / shards) for kept in ("moments", "average"))
            self._kept = {"weights": whole, "moments": moments, "average": copies}
            _watch(pretrainer, held)
            self._image_tokens = 0
            pretrainer.model.image.register_forward_hook(self._see)
            self._counter = Counter()
            self._counter.watch_again(pretrainer)

    def step(self, make: Make) -> Found:
        """One step over these micro-batches.

        Raises:
            UserError: it cannot be run on paper.
        """
        setting, held = self._setting, self._held
        with self._on_paper():
            self._paper.collective = seen = _Sent(held, setting.per_node, parallel=setting.parallel)
            self._counter.counts.clear()
            held.forget_peak()
            _step(setting, self._wrapped, self._optimizer, make(self._paper), held, self._counter)
            self._paper.collective = lambda _: None
            self._optimizer.zero_grad(set_to_none=True)
        return Found(
            flops=dict(self._counter.counts),
            bytes={cause: size for cause, size in held.at_peak.items() if size},
            sent=dict(seen.bytes),
            parts=self._parts,
            image_tokens=self._image_tokens,
            kept=self._kept,
        )

    def _see(self, _: nn.Module, __: Any, encoded: Encoded) -> None:
        self._image_tokens = encoded.tokens.shape[1]

    @contextmanager
    def _on_paper(self) -> Generator[dist.ProcessGroup | None]:
        with pretended(self._setting.world) as group, as_on(self._setting.kind), self._paper, self._held:
            yield group


def _spread(setting: Setting, pretrainer: Pretrainer, ranks: Ranks, held: Held) -> Wrapped:
    run = setting.run
    # Compiled blocks have the same operators, and nothing to be compiled for.
    several = ranks.group is not None
    spread = replace(
        run.spread, compile=False, parallel=setting.parallel if several else "ddp",
        shard=run.spread.shard if several and setting.parallel == "fsdp" else "node", offload=False,
    )  # fmt: skip
    lanes = run.shuffle.lanes if run.deterministic == "elastic" else None
    with held.making("weights" if setting.parallel == "fsdp" else "communication"):
        wrapped = wrap(pretrainer, ranks, spread, bf16=setting.bf16, lanes=lanes)
    if isinstance(wrapped, Replicated):
        # Without annotations, which torch compares with its own.
        wrapped.ddp.register_comm_hook(ranks.group, lambda group, bucket: _meet(group, bucket))
    return wrapped


def _meet(group: Any, bucket: Any) -> torch.futures.Future[Tensor]:
    """What DistributedDataParallel does of its own, as a call that can be seen."""
    dist.all_reduce(bucket.buffer(), group=group)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _warm(pretrainer: Pretrainer, optimizer: torch.optim.Optimizer, held: Held) -> None:
    """Let the optimizer make what it keeps, as it has from the second step on."""
    with held.making("passing"), torch.no_grad():
        for parameter in pretrainer.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    with held.making("moments"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _watch(pretrainer: Pretrainer, held: Held) -> None:
    """Tell what is made by what is running."""
    for objective in pretrainer.objectives.values():
        _around(objective, "loss", held)
        objective.draw = _during(objective, held)
    for tower in TOWERS:  # run when an objective first reads them
        if (part := getattr(pretrainer.model, tower)) is not None:
            _around(part, "activations", held)
    for part in pretrainer.modules():
        if isinstance(part, VocabularyHead):
            _around(part, "head", held)
    for parameter in pretrainer.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda each: held.is_for(each.grad, "gradients") if each.grad is not None else None
            )


def _around(module: nn.Module, cause: str, held: Held) -> None:
    entered: list[AbstractContextManager[None]] = []

    def begin(*_: Any) -> None:
        entered.append(held.making(cause))
        entered[-1].__enter__()

    def end(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end, always_call=True)


def _during(objective: Objective, held: Held) -> Any:
    draw = objective.draw

    def drawn(*arguments: Any) -> Any:
        with held.making("loss"):
            return draw(*arguments)

    return drawn


class _Sent:
    """Adds up what this rank sends."""

    def __init__(self, held: Held, per_node: int, *, parallel: str) -> None:
        self.bytes: Sums[tuple[str, str]] = Sums()
        self._held, self._per_node, self._fsdp = held, per_node, parallel == "fsdp"

    def __call__(self, met: Collective) -> None:
        """Of this collective."""
        if self._held.cause == "loss":
            cause = "features"
            if met.into is not None:
                self._held.is_for(met.into, "features")
        else:
            cause = "parameters" if met.name.startswith("allgather") else "gradients"
            if met.into is not None and self._fsdp:
                kept = cause == "gradients"  # a shard of it is the parameter's
                self._held.is_for(met.into, "gradients" if kept else "communication")
        self.bytes[cause, "node" if met.within(self._per_node) else "network"] += met.sent


def _step(
    setting: Setting,
    wrapped: Wrapped,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    held: Held,
    counter: Counter,
) -> None:
    compute = Compute(device=_CPU, bf16=setting.bf16)
    setup = Setup(
        wrapped=wrapped, compute=compute, pool=setting.run.pool, watch=lambda part: counting(counter, part)
    )
    with held.making("activations"), warnings.catch_warnings():
        # Sizes have strides of their own, and no number is copied for it.
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        counts = agree(setup, batches).counts
        factors = {name: 1.0 / count.clamp(min=1) for name, count in counts.items()}
        backward(setup, batches, factors, key=(0, 0))
    with held.making("optimizer"):
        norms = gradient_norms(wrapped.pretrainer)
        clip(wrapped.pretrainer, norms.whole, largest=setting.run.stages[setting.stage].optim.clip)
        optimizer.step()


def _locals(module: nn.Module, *, trained: bool = False) -> list[Tensor]:
    """What this rank has of the parameters, detached."""
    return [
        getattr(each, "_local_tensor", each).detach()
        for each in module.parameters()
        if each.requires_grad or not trained
    ]


def _bytes(tensors: Any) -> int:
    return sum(each.nbytes for each in tensors)
