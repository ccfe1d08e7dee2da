"""Implementations of one thing beside each other: time in turns, and peak memory in a process for each.

On a CPU time is that of the processor, not of the clock, and the operating system's record of the process
tells its peak memory: neighbours disturb neither much. On an accelerator it is the clock, and its allocator.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """What one call takes."""
    if device.type == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.accelerator.synchronize()
    began = time.perf_counter()
    call()
    torch.accelerator.synchronize()
    return time.perf_counter() - began


def in_turns(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call in each round; a first round, in which memory is fetched, is not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            took = seconds(call, device)
            if number:
                found[name].append(took)
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of our time by theirs: what slows a whole round is in both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def growth(call: Callable[[], object], device: torch.device) -> float:
    """MB by which a call's peak memory is above what this process holds before it."""
    _forget_peak(device)
    before = _peak(device)
    call()
    return _peak(device) - before


def in_own_process(module: str, arguments: Sequence[str]) -> float:
    """The number that `python -m MODULE ARGUMENTS` prints last."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def _forget_peak(device: torch.device) -> None:
    """Let the peak be what is held now: making the inputs may have taken more."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> float:
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated() / 1e6
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6
