"""Train the same command with several seeds and say what came of it, beside chance and the CPU it took.

    python -m benchmarks.recall --seeds 3 -- --data 'train/*.tar' --val 'val/*.tar' --stages.one.steps 2000

Everything after `--` is a command line of pretrain.launch. Each seed is a process of its own; CPU seconds
are those of the whole process, user and system.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from pretrain.sinks import jsonl

_PREFIX = "eval/"


def train(arguments: Sequence[str], out: Path) -> tuple[dict[str, float], float, float]:
    """Run once; the evaluation, the CPU seconds and the wall seconds of training."""
    before = os.times()
    command = [sys.executable, "-m", "pretrain.launch", *arguments, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    records = list(jsonl.read(out / "metrics.jsonl"))
    values = {name: value for name, value in records[-1].items() if name.startswith(_PREFIX)}
    return values, cpu, after.elapsed - before.elapsed


def main() -> None:
    """Read the command line, train, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... to train with")
    parser.add_argument("launch", nargs="+", help="arguments of pretrain.launch, after --")
    options = parser.parse_args()
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            values, cpu, wall = train([*options.launch, "--seed", str(seed)], Path(folder) / str(seed))
            print(f"seed {seed}: {cpu:.0f} CPU seconds, {wall:.0f} s", flush=True)
            found.append(values)
    width = max(map(len, found[0])) - len(_PREFIX)
    print(f"{'':{width}}  {'mean':>6}  {'min':>6}  {'max':>6}")
    for name in found[0]:
        each = [values[name] for values in found]
        label = name.removeprefix(_PREFIX)
        print(f"{label:<{width}}  {mean(each):6.3f}  {min(each):6.3f}  {max(each):6.3f}")


if __name__ == "__main__":
    main()
