"""Train open_clip_train and Medley's `itc` on the same work, and say which has learned more by when.

    python -m benchmarks.learning --data NAME 'train/*.tar' 'val/*.tar' [--data ...] [--cpu-seconds 240]

Data are tar shards in img2dataset's layout. Each seed trains three times: open_clip_train on a schedule that
fills the budget, Medley on the same steps, and Medley on a schedule that fills the time open_clip_train took.
Time is CPU time, user and system, of the program and all it starts, imports included; recall is Medley's
evaluation of both systems' checkpoints, which is not counted. Finished runs are kept in the --out folder: the
same command goes on. The peer's environment (about 5 GB, from the package registry) is made once. Linux only.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import signal
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.learning.contest import MUON, SYSTEMS, Contest
from benchmarks.learning.environment import peer_python, versions
from benchmarks.learning.pairs import write_pairs
from benchmarks.learning.recall import Examination
from benchmarks.learning.report import curves, plot, tables
from benchmarks.learning.systems import Settings, resolution
from datasets.atomic import replace
from datasets.errors import UserError
from datasets.shards.patterns import named

_MODEL = Path(__file__).with_name("vit-64-8.json")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = ("NAME", "TRAIN", "VAL")
    parser.add_argument("--data", nargs=3, action="append", metavar=what, required=True, help="tar shards")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--cpu-seconds", type=float, default=240, help="budget of a run of open_clip_train")
    parser.add_argument("--model", type=Path, default=_MODEL, help="an open_clip model configuration, JSON")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--crop", type=float, default=0.9, help="least share of an image that a crop keeps")
    parser.add_argument("--marks", type=int, default=8, help="checkpoints of a run")
    parser.add_argument("--muon", action="store_true", help="also Medley with its default optimizer")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--environment", type=Path, help="the peer's; default OUT/environment")
    return parser.parse_args()


def _train(options: argparse.Namespace) -> dict[str, Any]:
    """Train everything that was not trained yet; what was found, by data set."""
    chosen = {name: getattr(options, name) for name in ("batch", "lr", "crop", "marks", "cpu_seconds")}
    settings = Settings(model=str(options.model.resolve()), **chosen)
    systems = (*SYSTEMS, MUON) if options.muon else SYSTEMS
    # What can be wrong is read before anything is installed or trained.
    side = resolution(settings.model)
    examinations: dict[str, Examination] = {}
    for name, train, val in options.data:
        named(train)
        examinations[name] = Examination.on(val, model=settings.model, resolution=side)
    python = peer_python(options.environment or options.out / "environment")
    found: dict[str, Any] = {
        "settings": asdict(settings),
        "processor": _processor(),
        "versions": {"open_clip_train": versions(python), "Medley": {"torch": version("torch")}},
        "data": {},
    }
    for name, train, val in options.data:
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        model = json.loads(options.model.read_bytes())
        _claim(folder / "settings.json", {**asdict(settings), "model": model, "train": train, "val": val})
        contest = Contest(
            settings=settings,
            python=python,
            folder=folder,
            train=train,
            pairs=write_pairs(train, folder / "pairs"),
            examination=examinations[name],
        )
        runs: dict[str, list[Any]] = {system: [] for system in systems}
        for seed in range(options.seeds):
            for system in systems:
                runs[system].append(contest.run(system, seed=seed))
        found["data"][name] = {
            "train": train,
            "val": val,
            "calibration": contest.calibration(),
            "runs": runs,
        }
    return found


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix runs of different settings."""
    wanted = json.dumps(settings, indent=1)
    if not path.exists():
        replace(path, wanted.encode())
    elif json.loads(path.read_bytes()) != json.loads(wanted):
        raise UserError(f"{path.parent} holds runs with other settings ({path}): choose another --out")


def _processor() -> str:
    found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    return found[1] if found else platform.machine()


def main() -> int:
    """Read the command line, train, print the tables, draw the plot."""
    options = _parsed()
    if options.marks < 2 or options.seeds < 1:
        sys.stderr.write("error: it takes at least two --marks, to measure speed, and one of --seeds\n")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    try:
        found = _train(options)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on with the runs that are not finished\n")
        return 130
    drawn = {}
    for name, of in found["data"].items():
        drawn[name] = {system: curves([run["marks"] for run in runs]) for system, runs in of["runs"].items()}
        measured = of["calibration"]["measured"]
        paces = ", ".join(f"{precision} {pace['step_seconds']:.3f} s" for precision, pace in measured.items())
        print(f"\n{name}: {options.seeds} seeds, batch {options.batch}; a step of open_clip_train: {paces}\n")
        print("\n".join(tables(drawn[name], batch=options.batch)))
    plot(drawn, options.out / "learning.png")
    replace(options.out / "learning.json", json.dumps(found, indent=1).encode())
    print(f"\n{options.out / 'learning.png'}, {options.out / 'learning.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
