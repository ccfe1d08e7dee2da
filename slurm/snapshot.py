"""A copy of the code that was submitted, which is what runs, however often the job starts again.

RUN_DIR/code/HASH holds the files of the repository that git tracks or would track. HASH is that of their
names and bytes: what was submitted twice is copied once, and a changed file makes another copy. Files are
read-only; directories are not, so that a run can be deleted like any other.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets.errors import UserError

_PACKAGES = ("datasets", "objectives", "pretrain", "slurm")
_LIMIT = 256 << 20
"""Bytes; a repository of code is far smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Where the code of a job lies."""

    folder: Path
    files: int
    size: int
    """Bytes."""
    commit: str
    """The commit it was taken from, with `+` where files differ from it; empty outside git."""

    def __str__(self) -> str:
        origin = f", commit {self.commit}" if self.commit else ""
        return f"{self.folder} ({self.files} files, {self.size / 1e6:.1f} MB{origin})"


def take(root: Path, into: Path, given: Mapping[str, Path] | None = None) -> Snapshot:
    """Copy the code below `into`, unless it lies there already.

    Args:
        root: the repository.
        into: the directory of copies, such as RUN_DIR/code.
        given: further files, by the path that they get in the copy.

    Raises:
        UserError: it is too large to be code, or cannot be written.
    """
    files = {name: root / name for name in sorted(_listed(root) or _packages(root))}
    files |= given or {}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    size = sum(sizes.values())
    if size > _LIMIT:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"the code to be copied holds {size / 1e6:.0f} MB, {sizes[largest] / 1e6:.0f} of them in "
            f"{largest}: name what is no code in .gitignore"
        )
    folder = into / _hash(files)
    if not folder.exists():
        try:
            _copy(files, folder)
        except OSError as error:
            raise UserError(f"the code cannot be copied to {into} ({error.strerror})") from error
    return Snapshot(folder=folder, files=len(files), size=size, commit=_commit(root))


def _listed(root: Path) -> list[str] | None:
    """What git tracks, or would if it were added; None where there is no git or no repository."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed is None:
        return None
    # What is tracked may be deleted, and a submodule is listed as a directory.
    return [name for name in listed.split("\0") if name and (root / name).is_file()]


def _packages(root: Path) -> Iterator[str]:
    for package in _PACKAGES:
        for path in (root / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield str(path.relative_to(root))


def _commit(root: Path) -> str:
    commit = (_git(root, "rev-parse", "--short", "HEAD") or "").strip()
    changed = commit and _git(root, "status", "--porcelain", "--", ".")
    return f"{commit}+" if changed else commit


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return os.fsdecode(result.stdout) if result.returncode == 0 else None


def _hash(files: Mapping[str, Path]) -> str:
    hashed = hashlib.blake2b(digest_size=6)
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        hashed.update(b"%s\0%d\0%d\0" % (os.fsencode(name), _mode(path), len(content)))
        hashed.update(content)
    return hashed.hexdigest()


def _copy(files: Mapping[str, Path], folder: Path) -> None:
    beside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    for name, path in files.items():
        target = beside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        target.chmod(_mode(path))
    try:
        beside.rename(folder)
    except OSError:
        shutil.rmtree(beside)  # another submission was faster
        if not folder.is_dir():
            raise


def _mode(path: Path) -> int:
    return 0o555 if os.access(path, os.X_OK) else 0o444
