"""Bytes that are alive, by what they are for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pretrain.memory import Alive, place_of


class Held(Alive):
    """Counts what is alive by cause, and keeps the account of the moment at which most was."""

    def __init__(self) -> None:
        super().__init__()
        self.cause = ""
        """What is made now is for."""
        self.by: Counter[str] = Counter()
        """Bytes alive now."""
        self.at_peak: dict[str, int] = {}
        self._causes: dict[int, str] = {}

    @contextmanager
    def making(self, cause: str) -> Generator[None]:
        """What is made inside is for this."""
        before, self.cause = self.cause, cause
        try:
            yield
        finally:
            self.cause = before

    def is_for(self, tensor: Tensor, cause: str) -> None:
        """A tensor turns out to be for this."""
        place = place_of(tensor)
        size = self._sizes.get(place, 0)
        if size:
            self.by[self._causes[place]] -= size
            self.by[cause] += size
            self._causes[place] = cause

    def forget_peak(self) -> None:
        """Look for the largest moment from now on."""
        self.peak, self.at_peak = self.bytes, dict(self.by)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What autocast makes of a parameter is as large for one sample as for many.
        rounds = func is torch.ops.aten._to_copy.default
        if rounds and self._causes.get(place_of(args[0])) in ("weights", "communication"):
            with self.making("rounded weights"):
                return super().__torch_dispatch__(func, types, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._causes[storage._cdata] = self.cause
        super()._count(storage)

    def _changed(self, place: int, size: int) -> None:
        self.by[self._causes[place]] += size - self._sizes.get(place, 0)
        before = self.peak
        super()._changed(place, size)
        if self.peak > before:
            self.at_peak = dict(self.by)
