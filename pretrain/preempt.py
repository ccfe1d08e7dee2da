"""Signal to flag: the loop asks at each step boundary, saves, and leaves.

Standard library only: signals are met before torch is imported, which takes seconds.
"""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""A scheduler's or service's stop, Ctrl-C, and the warning that Slurm can send before its time limit."""


class Preemption:
    """While entered, a signal only sets `requested`; a second Ctrl-C interrupts at once.

        with Preemption() as preemption:
            for batch in batches:
                step(batch)
                if preemption.requested: ...

    Entered in the main thread, where Python delivers signals.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the first signal that came, e.g. SIGTERM."""
        self._interrupted = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether to stop."""
        return self.requested is not None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.requested = self.requested or signal.Signals(number).name


def ignore() -> None:
    """The process only ends now: whoever ends it too must not change its exit code.

    The interpreter gives back the default, which is to die, to every signal that has a handler before it is
    done itself.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def sheltered() -> Generator[None]:
    """What is started inside never hears these signals: they are for the training, which ends its helpers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
