"""What a user names as data: manifests, tar shards by path, glob, brace range or URL, several with commas."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from itertools import islice
from math import prod
from pathlib import Path

from braceexpand import braceexpand

from datasets.errors import UserError
from datasets.homes import at_home

_BETWEEN = re.compile(r",(?![^{}]*\})")  # commas, but not those within braces
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_MOST = 1_000_000  # shards that one brace range may name


def named(spec: str) -> list[str]:
    """The manifests (.json) and shards that a comma-separated list names, in order; local paths are absolute.

    Raises:
        UserError: a pattern matches nothing or cannot be expanded, or nothing is named, or one thing twice.
    """
    found: list[str] = []
    for pattern in filter(None, map(str.strip, _BETWEEN.split(spec))):
        if pattern.startswith("pipe:"):
            raise UserError(f"{pattern} is a command, and none is ever run for data: name files or URLs")
        expanded = _braces(pattern)
        if "://" not in pattern:
            found += [os.path.abspath(path) for one in expanded for path in _local(one)]  # noqa: PTH100 (without ..)
        elif "*" in pattern:
            raise UserError(f"{pattern} has a star, but a server tells no names: give a brace range")
        else:
            found += expanded
    if not found:
        raise UserError(f"{spec!r} names no tar file: give a path, a glob, a brace range or a manifest")
    once(found)
    return found


def once(names: list[str]) -> None:
    """Refuse what is named twice; raises UserError."""
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{twice} is named twice: name every shard once")


def _braces(pattern: str) -> list[str]:
    try:
        count = prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern))
        expanded = list(islice(braceexpand(pattern), _MOST)) if count <= _MOST else []
    except ValueError as error:
        raise UserError(f"{pattern} has braces that do not match") from error
    if not 0 < len(expanded) < _MOST:
        raise UserError(f"{pattern} names a million shards or more: write several manifests")
    return expanded


def _local(name: str) -> list[Path]:
    path = at_home(name)
    if path.is_file():
        return [path]
    pattern = str(path)
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path.glob refuses absolute patterns)
    found = [path for path in map(Path, sorted(names)) if path.is_file()]
    if found:
        return found
    if path.is_dir():
        raise UserError(f"{pattern} is a directory: name the shards in it, as in '{path / '*.tar'}'")
    nearest = next(parent for parent in path.absolute().parents if parent.is_dir())
    inside = sorted(each.name for each in nearest.iterdir())
    holds = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
    raise UserError(
        f"no file matches {pattern}; the nearest directory that exists is {nearest}, which holds "
        f"{holds or 'nothing'}"
    )
