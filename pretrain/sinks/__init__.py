"""Where reports go. The loop tells one sink, usually a `Fanout`, and never asks which are on.

Values are plain floats by name; these names mean something to the sinks, all others are only recorded:

    samples                 images seen since the start of the run: the axis of every plot
    train/loss              what was minimised, weights applied
    train/loss/NAME         the loss of objective NAME, before its weight
    perf/samples_per_second, perf/data_wait (share, 0..1), perf/seconds_left       from `pretrain.clock`
    eval/NAME               what the model was judged to be

Anything else is GROUP/NAME with one of the groups train, eval, perf, data, model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class Sink(Protocol):
    """Somewhere that reports go. Only rank zero has any."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A report: steps ascend; the last one is reported again with what the model was judged to be."""
        ...

    def note(self, text: str) -> None:
        """A sentence for whoever follows the run."""
        ...

    def close(self) -> None:
        """The run has ended, well or not."""
        ...


class Fanout:
    """Several sinks as one; none at all is the null object."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = tuple(sinks)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Pass a report on to each."""
        for sink in self._sinks:
            sink.step(step, values)

    def note(self, text: str) -> None:
        """Pass a sentence on to each."""
        for sink in self._sinks:
            sink.note(text)

    def close(self) -> None:
        """Close each."""
        for sink in self._sinks:
            sink.close()
