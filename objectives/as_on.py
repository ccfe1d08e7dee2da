"""For which kind of device is chosen: what only counts an operator need not run where it would."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_AS_ON: ContextVar[str] = ContextVar("as_on", default="")


@contextmanager
def as_on(kind: str) -> Generator[None]:
    """Choose inside as on a device of this kind, for who only counts what it would do there."""
    before = _AS_ON.set(kind)
    try:
        yield
    finally:
        _AS_ON.reset(before)


def chosen_for(device: torch.device) -> str:
    """The kind of device for which is chosen: that of `as_on`, or the device's own."""
    return _AS_ON.get() or device.type
