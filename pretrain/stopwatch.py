"""What the time of a step is spent on, and how much arithmetic is done in it.

On a GPU the parts are bracketed by events, which are only read when a report is made: no step waits for the
device.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from datasets.batch import Batch
from pretrain.flops import Counter, StepFlops, counting
from pretrain.step import Part

PARTS: tuple[Part, ...] = ("forward", "backward", "optimizer", "wait")
"""What a step is made of, beside getting its data. `wait` is for the ranks that are not here yet."""
_TOWERS = ("image", "text", "captioner")
_Mark = float | torch.cuda.Event


class Stopwatch:
    """Seconds of each part and FLOPs of the steps since the last report; `pretrain.step.Setup.watch`.

    Where ranks meet inside a part (the gather of contrast, the sum of gradients), the fast ones wait there
    and the part gets longer for them. So a slow rank is told by what waits for no one: the forward of its
    towers, `towers` in what is taken, which is a piece of `forward`.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        flops: StepFlops | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin.

        Args:
            device: where steps run.
            flops: what is known of the FLOPs of steps; by default, nothing yet.
            now: seconds, from any origin.
        """
        self.peak = 0.0
        """FLOP/s that matmuls reach on this device; 0 for not measured."""
        self._on_gpu, self._now = device.type == "cuda", now
        self._known = flops or StepFlops()
        self._counter = Counter()
        self._counts = False
        self._part = ""
        self._spans: list[tuple[str, _Mark, _Mark]] = []
        self._flops = 0.0

    def __call__(self, part: Part) -> AbstractContextManager[None]:
        """Time inside is spent on this."""
        return self._spend(part)

    @contextmanager
    def _spend(self, part: Part) -> Generator[None]:
        self._part, begin = part, self._mark()
        try:
            with counting(self._counter, part) if self._counts else nullcontext():
                yield
        finally:
            self._part = ""
        self._spans.append((part, begin, self._mark()))

    def attach(self, pretrainer: nn.Module) -> None:
        """Watch the towers of a pretrainer, and which of its forwards are run once more later."""
        self._counter.watch_again(pretrainer)
        begun: list[_Mark] = []

        def begin(*_: object) -> None:
            if self._part == "forward":
                begun.append(self._mark())

        def end(*_: object) -> None:
            if self._part == "forward":
                self._spans.append(("towers", begun.pop(), self._mark()))

        for name in _TOWERS:
            tower = getattr(pretrainer.model, name)
            if tower is not None:
                tower.register_forward_pre_hook(begin)
                tower.register_forward_hook(end)

    @contextmanager
    def step(self, batches: Sequence[Batch]) -> Generator[None]:
        """A step over these micro-batches, which are better not on a GPU, runs inside."""
        self._counts = self._known.wants(batches)
        self._counter.counts.clear()
        try:
            yield
        finally:
            counted, self._counts = self._counts, False
        if counted:
            found = self._counter.counts
            self._known.learn(batches, found["forward"] + found["backward"])
        self._flops += self._known.of(batches)

    def take(self) -> dict[str, float]:
        """Seconds of each part since this was called last, the model's FLOPs, and the peak, if it is known.

        FLOPs are those of forward and backward; what is run again to save memory, and what the optimizer
        multiplies, are not the model's.
        """
        spent: defaultdict[str, float] = defaultdict(float, dict.fromkeys(PARTS, 0.0))
        for part, begin, end in self._spans:
            spent[part] += self._between(begin, end)
        flops, self._flops = self._flops, 0.0
        self._spans.clear()
        return {**spent, "flops": flops, "peak": self.peak}

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: _Mark, end: _Mark) -> float:
        if isinstance(begin, float) and isinstance(end, float):
            return end - begin
        assert isinstance(begin, torch.cuda.Event)
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return begin.elapsed_time(end) / 1000
