"""Write the sidecars and the manifest of tar shards: `python -m datasets.index 'shards/*.tar' [--out DIR]`.

Exit codes: 0 done, 2 the user can mend it, 130 stopped: what was done is kept for the next time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from datasets.commands import run
from datasets.errors import UserError
from datasets.homes import at_home
from datasets.remote.fetch import is_remote
from datasets.shards.indexing import Job, Outcome, cores, index_one, shown_url
from datasets.shards.manifest import LeftOut, Manifest, shared
from datasets.shards.opening import counted, entry, is_manifest
from datasets.shards.patterns import named
from datasets.shards.spread import spread

_DESCRIPTION = "Write a sidecar beside each tar shard, and DIR/manifest.json, which names them all."
DONE, USER_ERROR, STOPPED = 0, 2, 130


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m datasets.index", description=_DESCRIPTION)
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="tar files: paths, globs, brace ranges; http(s)://, s3:// or gs:// URLs with brace ranges",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where sidecars and manifest go; default: beside the shards, and the folder they share",
    )
    parser.add_argument(
        "--workers", type=int, default=cores(), metavar="N", help="default: one for each core"
    )
    parser.add_argument(
        "--without-damaged", action="store_true", help="leave damaged shards out, and say so in the manifest"
    )
    options = parser.parse_args(arguments)
    try:
        if options.workers < 1:
            raise UserError(f"--workers {options.workers} cannot work: give 1 or more")
        _index(",".join(options.shards), options.out, options.workers, leave_out=options.without_damaged)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from here\n")
        return STOPPED
    return DONE


def _index(spec: str, out: Path | None, workers: int, *, leave_out: bool) -> None:
    jobs, folder = _jobs(named(spec), out)
    began = monotonic()
    outcomes = spread(index_one, jobs, verb="indexed", workers=workers, processes=True, say=_say)
    broken = [(each.job.url, each.problem) for each in outcomes if each.problem is not None]
    for each in outcomes:
        if each.changed:
            _say(f"changed: {shown_url(each.job.url)} has other content than when it was indexed before")
    for url, problem in broken:
        _say(f"damaged: {shown_url(url)} at byte {problem.offset}: {problem.reason} ({problem.kind})")
    if broken and (not leave_out or len(broken) == len(outcomes)):
        raise UserError(
            f"{len(broken)} of {counted(len(outcomes), 'shard')} are damaged, and no manifest was written: "
            "fetch or pack them again, or leave them out with --without-damaged"
        )
    root = shared([job.url for job in jobs])
    manifest = Manifest.of(
        (entry(each.job, each.head) for each in outcomes if each.head is not None),
        left_out=[LeftOut(url[len(root) :], each.kind, each.offset, each.reason) for url, each in broken],
    )
    _report(outcomes, manifest, monotonic() - began)
    if not manifest.size:
        raise UserError(
            "there is no sample: one is KEY.jpg (.jpeg, .png, .webp), KEY.txt, KEY.json or KEY.cls"
        )
    try:
        manifest.save(folder / "manifest.json")
    except OSError as error:
        raise UserError(f"cannot write {folder / 'manifest.json'}: {error.strerror}") from error
    sys.stdout.write(f"{shown_url(str(folder / 'manifest.json'))}\n")


def _jobs(names: list[str], out: Path | None) -> tuple[list[Job], Path]:
    """Which sidecars are to be written, and the folder that the manifest goes to."""
    for name in names:
        if is_manifest(name):
            raise UserError(f"{shown_url(name)} is a manifest: name the shards it was made of")
        if out is None and is_remote(name):
            raise UserError(
                f"{shown_url(name)} is remote: give sidecars and manifest a place, with --out DIR"
            )
        if is_remote(name) and "?" in name:
            raise UserError(
                f"{shown_url(name)} has a query, often a signature that expires, which would be written into "
                "the manifest and the names of samples: give a URL without one, or s3:// or gs://, which "
                "take credentials from the environment"
            )
    root = shared(names)
    if not root:
        other = next(name for name in names if not shared([names[0], name]))
        raise UserError(
            f"{shown_url(names[0])} and {shown_url(other)} share no folder: index them apart, and name both "
            "manifests where the data are used"
        )
    folder = Path(root) if out is None else at_home(out).absolute()
    labels = [name[len(root) :] for name in names]
    outside = [label for label in labels if ".." in label.split("/")]
    if outside:
        raise UserError(f"{outside[0]} would lead out of {folder}: name the shard without '..'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    return [Job(name, f"{folder}/{label}.idx") for name, label in zip(names, labels, strict=True)], folder


def _report(outcomes: list[Outcome], manifest: Manifest, seconds: float) -> None:
    fresh = [outcome for outcome in outcomes if outcome.seconds and outcome.head is not None]
    size = sum(outcome.head.bytes for outcome in fresh if outcome.head is not None)
    unusable = sum(outcome.unusable for outcome in fresh)
    kept = len(outcomes) - len(fresh) - len(manifest.left_out)
    speed = ""
    if size:
        cpu = sum(outcome.seconds for outcome in fresh) / size * 1e9
        speed = f", {size / 1e9 / seconds:.2f} GB/s, {cpu:.2f} CPU s/GB"
    _say(
        f"indexed {counted(len(fresh), 'shard')} ({size / 1e9:.2f} GB) in {seconds:.1f} s{speed}"
        + (f"; {kept} were indexed already" if kept else "")
        + (f"; {len(manifest.left_out)} damaged ones left out" if manifest.left_out else "")
    )
    _say(
        f"{counted(len(manifest), 'shard')}, {counted(manifest.size, 'sample')}"
        + f", fingerprint {manifest.fingerprint}"
    )
    if unusable:
        _say(f"{counted(unusable, 'sample')} cannot be used: `python -m datasets.check` says why")


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    run(main)
