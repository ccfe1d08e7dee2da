"""Read shards again and print what is wrong with them: `python -m datasets.check SPEC [--out FILE.json]`.

Exit codes: 0 nothing is wrong, 1 something is, 2 the user can mend the command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from datasets.atomic import replace
from datasets.commands import run
from datasets.errors import UserError
from datasets.shards.checking import Checked, Wanted, check_one
from datasets.shards.indexing import cores, indexed_as, shown_url
from datasets.shards.manifest import Manifest
from datasets.shards.opening import counted, is_manifest
from datasets.shards.patterns import named
from datasets.shards.repeats import repeats
from datasets.shards.scan import Problem
from datasets.shards.spread import spread

_DESCRIPTION = "Read shards again, against what was indexed, and print problems by kind."
_SHOWN = 20  # problems of a kind that are printed
DONE, PROBLEMS, USER_ERROR, STOPPED = 0, 1, 2, 130


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m datasets.check", description=_DESCRIPTION)
    parser.add_argument(
        "shards", nargs="+", metavar="SPEC", help="manifests, and tar files by path, glob, brace range or URL"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all problems as JSON")
    parser.add_argument("--workers", type=int, default=cores(), metavar="N", help="default: one a core")
    options = parser.parse_args(arguments)
    try:
        if options.workers < 1:
            raise UserError(f"--workers {options.workers} cannot work: give 1 or more")
        return _check(",".join(options.shards), options.out, options.workers)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return STOPPED


def _check(spec: str, out: Path | None, workers: int) -> int:
    wanted, left_out = _wanted(named(spec))
    began = monotonic()
    found = spread(check_one, wanted, verb="checked", workers=workers, processes=True, say=_say)
    problems = left_out
    for each, checked in zip(wanted, found, strict=True):
        problems += [(each.url, problem) for problem in checked.problems]
    problems += repeats(wanted, sum(each.samples for each in found))
    if out is not None:
        _write(out, problems, found)
    _print(problems)
    size, samples = sum(each.bytes for each in found), sum(each.samples for each in found)
    new = sum(not each.sidecar for each in wanted)
    sys.stdout.write(
        f"{counted(len(found), 'shard')}, {counted(samples, 'sample')}, {size / 1e9:.2f} GB in "
        f"{monotonic() - began:.1f} s: {counted(len(problems), 'problem') if problems else 'no problems'}"
        + (f"; {new} had no sidecar to compare with" if new else "")
        + "\n"
    )
    return PROBLEMS if problems else DONE


def _wanted(names: list[str]) -> tuple[list[Wanted], list[tuple[str, Problem]]]:
    """The shards, and what manifests say they did without."""
    wanted: list[Wanted] = []
    left_out: list[tuple[str, Problem]] = []
    for name in names:
        if is_manifest(name):
            manifest = Manifest.load(name)
            wanted += [Wanted(shard.url, shard.sidecar, shard.digest) for shard in manifest]
            left_out += [
                (each.label, Problem("left out", each.offset, f"{each.reason} ({each.kind})"))
                for each in manifest.left_out
            ]
        else:
            wanted.append(Wanted(name, indexed_as(name), ""))
    return wanted, left_out


def _print(problems: list[tuple[str, Problem]]) -> None:
    for kind in sorted({problem.kind for _, problem in problems}):
        of_kind = [(url, problem) for url, problem in problems if problem.kind == kind]
        sys.stdout.write(f"{kind} ({len(of_kind)})\n")
        for url, problem in of_kind[:_SHOWN]:
            sample = f", sample {problem.key}" if problem.key else ""
            sys.stdout.write(f"  {shown_url(url)} at byte {problem.offset}{sample}: {problem.reason}\n")
        if len(of_kind) > _SHOWN:
            sys.stdout.write(f"  ... and {len(of_kind) - _SHOWN} more: --out FILE lists all\n")


def _write(path: Path, problems: list[tuple[str, Problem]], found: list[Checked]) -> None:
    content = {
        "shards": len(found),
        "samples": sum(each.samples for each in found),
        "bytes": sum(each.bytes for each in found),
        "problems": [
            {"kind": one.kind, "shard": url, "key": one.key, "offset": one.offset, "reason": one.reason}
            for url, one in problems
        ],
    }
    try:
        replace(path, f"{json.dumps(content, indent=1)}\n".encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    run(main)
