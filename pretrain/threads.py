"""How many CPU threads a step is fastest with, measured on the step itself.

Small models lose more to waiting for each other's threads than they gain from them, and beside another busy
process two threads can be several times slower than one; large models want every core. The answer is
kept with the run, since the bits of a sum depend on how it was cut.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from datasets.errors import UserError
from pretrain.fencing import replace

_TRIES = 3
_WORTH = 0.85
"""More threads must take at most this share of the time of one."""


def settle_threads(wanted: int, *, kept: Path, step: Callable[[], None] | None) -> int:
    """Set torch's intra-op threads for this process, and return how many.

    Args:
        wanted: --precision.threads; 0 to measure.
        kept: file in which the run keeps what was measured first.
        step: one forward and backward of the run's own model and batch; None where there is nothing to
            choose or keep, on a GPU or among ranks that share the cores already.

    Raises:
        UserError: `kept` holds something else than a number.
    """
    most = torch.get_num_threads()
    if wanted:
        chosen = wanted
    elif kept.exists():
        chosen = _kept(kept)
    elif step is None or most == 1 or "OMP_NUM_THREADS" in os.environ:
        chosen = most
    else:
        alone, together = _seconds(1, step), _seconds(most, step)
        chosen = most if together < _WORTH * alone else 1
    torch.set_num_threads(chosen)
    if step is not None:
        replace(kept, f"{chosen}\n".encode())
    return chosen


def _kept(kept: Path) -> int:
    text = kept.read_text().strip()
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{kept} holds {text!r} where a number of threads should stand: remove it")
    return int(text)


def _seconds(threads: int, step: Callable[[], None]) -> float:
    """The best wall time of a few tries, after one to warm up."""
    torch.set_num_threads(threads)
    step()
    best = float("inf")
    for _ in range(_TRIES):
        begin = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - begin)
    return best
