"""Floating-point operations of a step, and the most that matmuls reach on this device.

Operations are counted with torch's own formulas (torch.utils.flop_counter): those of matmuls, convolutions
and attention, two for a multiplication and its addition, on the shapes that really ran. What the autograd
engine and hand-written `autograd.Function`s run is seen like everything else; a kernel of another kind counts
nothing. Counting watches operators as they are dispatched and changes no number.

B images, N texts, T tokens of the longest text.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from datasets.batch import Batch
from pretrain.precision import Compute

AGAIN = "again"
"""The part of what runs a second time to save memory: no work of the model's."""
_FORMULAS = {
    **flop_registry,
    # Hand-written gradients add in place, for which torch has no formula of its own.
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
}
_SIDES = (512, 1024, 2048, 4096, 8192)
_PEAK_SECONDS = 0.3
_TRIES = 4


class Counter(TorchDispatchMode):
    """FLOPs of what runs inside, by the part of the step that is named by `part`.

    A forward that is run again inside the backward (activation checkpointing) is told by gradients being
    recorded there; the encodings of coupled micro-batches, by the phase of the pretrainer (`watch_again`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.part = ""
        self.again = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device  # asked some times for every operator on sizes
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what it makes of its shards comes by here
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            again = self.again or (self.part == "backward" and torch.is_grad_enabled())
            self.counts[AGAIN if again else self.part] += int(formula(*args, **kwargs, out_val=out))
        return out

    def watch_again(self, pretrainer: nn.Module) -> None:
        """Learn from now on when a pretrainer encodes what it will encode once more, with gradient."""

        def begin(_: nn.Module, __: Any, options: Mapping[str, Any]) -> None:
            self.again = options.get("phase") == "encode"

        def end(*_: Any) -> None:
            self.again = False

        pretrainer.register_forward_pre_hook(begin, with_kwargs=True)
        pretrainer.register_forward_hook(end, always_call=True)


class StepFlops:
    """The model's FLOPs of any step, from those of the steps that were counted.

    They are a polynomial of the shapes: of images by resolution, of texts, of their tokens, padded and real,
    and of the square of their length, for each source. A shape that is new is counted, as long as few were;
    the polynomial through all that were counted answers for the others. (What contrast does with every pair
    of a batch is no part of it: it changes only where the size of the batch does.)
    """

    def __init__(self, *, first: int = 4, every: int = 200, sights: int = 1) -> None:
        """Nothing is known yet.

        Args:
            first: shapes that are counted in any case.
            every: one more for so many steps, which bounds what counting costs.
            sights: how often a shape must have been seen when it is counted; 2 where code is compiled for it,
                which torch does not do under the eye of a counter.
        """
        self._first, self._every, self._sights = first, every, sights
        self._steps = 0
        self._seen: defaultdict[tuple[object, ...], int] = defaultdict(int)
        self._counted: list[tuple[dict[str, float], int]] = []
        self._terms: dict[str, float] = {}
        """FLOPs of one unit of each term."""

    @property
    def counted(self) -> int:
        """Steps counted so far."""
        return len(self._counted)

    def wants(self, batches: Sequence[Batch]) -> bool:
        """Whether this step, which is about to run, is to be counted."""
        self._steps += 1
        shape = tuple((batch.source, batch.images.shape, batch.tokens.shape) for batch in batches)
        self._seen[shape] += 1
        if self._seen[shape] < self._sights:
            return False
        if not _terms(batches).keys() <= self._terms.keys():
            return True
        return self._seen[shape] == self._sights and self.counted < self._first + self._steps / self._every

    def learn(self, batches: Sequence[Batch], flops: int) -> None:
        """Take in what was counted of a step."""
        self._counted.append((_terms(batches), flops))
        names = list(dict.fromkeys(name for terms, _ in self._counted for name in terms))
        table = np.array([[terms.get(name, 0.0) for name in names] for terms, _ in self._counted])
        scale = table.max(axis=0)
        scale[scale == 0] = 1.0
        # As long as fewer steps than terms were counted, the shortest solution goes through all of them.
        found, *_ = np.linalg.lstsq(
            table / scale, np.array([flops for _, flops in self._counted]), rcond=None
        )
        self._terms = dict(zip(names, (found / scale).tolist(), strict=True))

    def of(self, batches: Sequence[Batch]) -> float:
        """FLOPs of a step over these micro-batches; 0 before any was counted."""
        return sum(self._terms.get(name, 0.0) * value for name, value in _terms(batches).items())


def _terms(batches: Sequence[Batch]) -> dict[str, float]:
    """The terms of the polynomial, by name."""
    terms: defaultdict[str, float] = defaultdict(float)
    for batch in batches:
        texts, longest = batch.tokens.shape
        side = "x".join(map(str, batch.images.shape[2:]))
        terms[f"{batch.source} images of {side}"] += len(batch.images)
        terms[f"{batch.source} texts"] += texts
        terms[f"{batch.source} tokens"] += texts * longest
        terms[f"{batch.source} pairs of tokens"] += texts * longest**2
        terms[f"{batch.source} words"] += float(batch.text_length.sum())
    return dict(terms)


def matmul_peak(compute: Compute) -> float:
    """FLOP/s of the best square matmul in the arithmetic and with the threads of training.

    In about 0.3 s: growing sizes as long as one more fits, the best of a few tries of each.
    """
    kind = torch.bfloat16 if compute.bf16 else torch.float32
    source = torch.Generator(compute.device).manual_seed(0)  # training's own is left alone
    best, begin = 0.0, time.perf_counter()
    for side in _SIDES:
        left, right = torch.rand(2, side, side, generator=source, device=compute.device).to(kind)
        # Transposed, as the weight of a linear layer is.
        seconds = _fastest(lambda a=left, b=right.T: a @ b, compute.device, tries=_TRIES)
        best = max(best, 2 * side**3 / seconds)
        if time.perf_counter() - begin + 8 * (_TRIES + 1) * seconds > _PEAK_SECONDS:
            break
    return best


def _fastest(work: Callable[[], object], device: torch.device, *, tries: int) -> float:
    """Wall seconds of the fastest try, after one to warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def once() -> float:
        wait()
        begin = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - begin

    once()
    return min(once() for _ in range(tries))


@contextmanager
def counting(counter: Counter, part: str) -> Generator[None]:
    """Count what runs inside as a part of the step."""
    counter.part = part
    with counter:
        yield
