"""How long a Slurm job may still run: at its limit all its processes are ended, and nobody requeues it."""

from __future__ import annotations

import math
import time

from pretrain.requeue import seconds_left

MARGIN = 15.0
"""Seconds before the limit in which a job must be given back to the queue, if it is to run again."""
_APART = 600.0
"""Seconds after which Slurm is asked again: the limit of a job may be changed while it runs."""
_AGAIN = 30.0


class TimeLimit:
    """Of one job, as Slurm says now and then."""

    def __init__(self, job: str) -> None:
        """Nothing is asked yet.

        Args:
            job: its number.
        """
        self._job = job
        self._end = math.inf
        self._look = time.monotonic()

    @property
    def pause(self) -> float:
        """Seconds after which `is_near` may have something new to say."""
        return max(0.0, self._look - time.monotonic())

    def is_near(self) -> bool:
        """Whether it comes within the margin; where Slurm does not answer, as it last said."""
        if self.pause:
            return False
        left = seconds_left(self._job)
        now = time.monotonic()
        if left is not None:
            self._end = now + left
        ahead = self._end - MARGIN - now
        self._look = now + min(ahead, _AGAIN if left is None else _APART)
        return ahead <= 0
