"""What a run remembers on disk: written beside, hashed, renamed; found again only if every byte verifies.

    checkpoints/step-00000500/
        model.safetensors  optimizer.safetensors    one file per group of tensors; where ranks share them, one
        model-00001.safetensors ...                 for each rank that holds some (pieces.py)
        state.json                                  everything that is not a tensor
        manifest.json                               size and hash of each file above; written last

No file is ever unpickled. A directory is complete from the moment it has its name: it is written as
`step-NNNNNNNN.tmp-ATTEMPT`, synced, and renamed. Only the process that holds the run directory's lock calls
`begin`, `commit`, `find` and `prune`; any rank may `write_part` in what it began, and read what it found.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from datasets.errors import UserError
from pretrain.fencing import check
from pretrain.pieces import (
    Entry,
    Piece,
    Saved,
    digest,
    file_name,
    group_of,
    readable,
    serialised,
    stage,
    write,
)

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
"""What survives a round trip as it was; a tuple comes back as a list."""

FORMAT = 2
_READ = (1, FORMAT)  # the first knew no pieces


class Contents(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, dict[str, Tensor]]
    """Group, then name, to a whole tensor in host memory."""
    state: dict[str, Any]
    """The JSON that was saved beside them."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory that verified when it was found."""

    folder: Path
    step: int
    """Optimizer steps done when it was saved."""

    def state(self) -> dict[str, Any]:
        """The JSON that was saved beside the tensors."""
        with readable(self.folder):
            return json.loads((self.folder / "state.json").read_bytes())

    def tensors(self) -> dict[str, Saved]:
        """Group to its tensors, of which each rank reads what it needs."""
        groups = sorted({group_of(path) for path in self.folder.glob("*.safetensors")})
        return {group: Saved(self.folder, group) for group in groups}

    def load(self) -> Contents:
        """Read all of it into fresh memory; nothing stays tied to the files."""
        tensors = {group: saved.load() for group, saved in self.tensors().items()}
        return Contents(tensors, self.state())


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, JSON]
) -> Path:
    """Write the checkpoint of a step, all or nothing, and return its directory: what one process does.

    A checkpoint of the same step that verifies is kept as it is; one that does not is set aside. Tensors
    that share memory (tied weights, views) are each saved in full, under each of their names: loading
    them into a model that ties them writes the same values twice.

    Args:
        folder: RUN_DIR/checkpoints.
        step: optimizer steps done.
        tensors: group (the name of a file) to names to tensors on any device.
        state: everything else that the run must remember.

    Raises:
        UserError: the directory cannot be written; what stood there before is untouched.
    """
    beside = begin(folder, step)
    if beside is None:
        return folder / _name(step)
    try:
        with _told(folder, step):
            staged = {group: stage(named, zero=True) for group, named in tensors.items()}
            return commit(beside, write_part(beside, staged, rank=0, state=state))
    except BaseException:
        drop(beside)
        raise


def begin(folder: Path, step: int) -> Path | None:
    """Make the directory that the ranks write the checkpoint of a step in; None if a good one stands there.

    Raises:
        UserError: it cannot be made.
    """
    target = folder / _name(step)
    check(folder)
    with _told(folder, step):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        if target.exists():
            if _fault(target) is None:
                return None
            _set_aside(target)
        # A process that was thought dead may still write in that of another attempt.
        beside = folder / f"{target.name}.tmp-{secrets.token_hex(4)}"
        beside.mkdir()
    return beside


def write_part(
    beside: Path,
    tensors: Mapping[str, Mapping[str, Piece]],
    *,
    rank: int,
    state: Mapping[str, JSON] | None = None,
    unwanted: Event | None = None,
) -> dict[str, Entry]:
    """Write and sync what a rank holds; what the manifest says of it.

    Args:
        beside: what `begin` made.
        tensors: group to names to pieces in host memory.
        rank: whose they are.
        state: everything else that the run must remember; rank zero has it.
        unwanted: set when nobody waits for it any more.

    Raises:
        OSError: it cannot be written.
        AbandonedError: it became unwanted.
    """
    files: dict[str, Entry] = {}
    for group, pieces in tensors.items():
        if pieces or rank == 0:
            name = file_name(group, pieces, rank)
            files[name] = write(beside / name, serialised(pieces), unwanted=unwanted)
    if state is not None:
        files["state.json"] = write(beside / "state.json", iter([json.dumps(state, indent=1).encode()]))
    return files


def commit(beside: Path, files: Mapping[str, Entry]) -> Path:
    """Give a directory in which all ranks have written its name: from then on it is a checkpoint.

    Args:
        beside: what `begin` made.
        files: what `write_part` said, of all ranks together.

    Raises:
        UserError: it cannot be, or what another rank wrote is not to be seen here.
    """
    target = beside.with_name(beside.name.partition(".")[0])
    step = _step(target)
    assert step is not None
    with _told(target.parent, step):
        for name, entry in files.items():
            seen = beside / name
            if not seen.is_file() or seen.stat().st_size != entry["bytes"]:
                reason = f"rank zero does not see {name}; every rank must write in the same directory"
                raise OSError(errno.ENOENT, reason)
        manifest = {"format": FORMAT, "step": step, "files": dict(files)}
        write(beside / "manifest.json", iter([json.dumps(manifest, indent=1).encode()]))
        _sync(beside)
        check(target)
        beside.replace(target)
        _sync(target.parent)
    return target


def drop(beside: Path) -> None:
    """Forget a directory that `begin` made."""
    shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _told(folder: Path, step: int) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(unsaved(folder, step, error.strerror or str(error))) from error


def unsaved(folder: Path, step: int, reason: str) -> str:
    """In words, that there is no checkpoint of a step, and why."""
    return (
        f"no checkpoint of step {step} could be written in {folder} ({reason}): "
        "make room there or choose another --out; the earlier ones are untouched"
    )


def find(folder: Path, *, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where none was ever written.

    One that does not verify is renamed to `step-NNNNNNNN.corrupt`, named with its fault through `report`,
    and the one before is tried.

    Raises:
        UserError: there were checkpoints and all of them are damaged.
    """
    if not folder.is_dir():
        return None
    _remove_unfinished(folder)
    damaged = False
    for step, path in _newest_first(folder):
        fault = _fault(path)
        if fault is None:
            if damaged:
                report(f"using checkpoint {path.name} instead")
            return Checkpoint(path, step)
        damaged = True
        report(f"checkpoint {path.name} is damaged ({fault}); it was set aside as {_set_aside(path).name}")
    # Those set aside by an earlier start count too: the same command twice must not end in a silent restart.
    corrupt = sorted(path.name for path in folder.glob("step-*.corrupt*"))
    if corrupt:
        raise UserError(
            f"every checkpoint in {folder} is damaged ({', '.join(corrupt)}): "
            "restore one from a copy, or choose another --out to start again"
        )
    return None


def chosen(folder: Path, step: int | None = None) -> Checkpoint:
    """The newest checkpoint that verifies, or that of a step, for whoever only reads: nothing is changed.

    Raises:
        UserError: there is none, or the one that was asked for is damaged; names those there are.
    """
    there = _newest_first(folder) if folder.is_dir() else []
    for found, path in there:
        if step in (None, found) and _fault(path) is None:
            return Checkpoint(path, found)
    if not there:
        raise UserError(f"{folder.parent} has no checkpoint yet: let it train to its first one")
    steps = ", ".join(str(found) for found, _ in reversed(there))
    wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
    raise UserError(f"{folder.parent} has no {wanted} that verifies (of steps there: {steps})")


def prune(folder: Path, *, keep: int, keep_every: int = 0, ends: Collection[int] = ()) -> None:
    """Remove checkpoints older than the last `keep` (at least 2) that verify.

    Args:
        folder: RUN_DIR/checkpoints.
        keep: how many of the newest stay.
        keep_every: those of steps that are multiples of it stay too; 0 for none.
        ends: steps whose checkpoints stay too: what stages came to.
    """
    assert keep >= 2, "with one checkpoint, damage to it would lose the run"
    check(folder)
    steps = _newest_first(folder)
    stay = {step for step, _ in steps if step in ends or (keep_every and step % keep_every == 0)}
    if all(step in stay for step, _ in steps[keep:]):
        return
    verified = 0
    for step, path in steps:
        if verified < keep:
            verified += _fault(path) is None
        elif step not in stay:
            # Renamed first, so that a kill half-way leaves rubbish rather than a damaged checkpoint.
            rubbish = folder / f"{path.name}.tmp-{secrets.token_hex(4)}"
            path.rename(rubbish)
            shutil.rmtree(rubbish)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _newest_first(folder: Path) -> list[tuple[int, Path]]:
    steps = ((_step(path), path) for path in folder.iterdir())
    return sorted(((step, path) for step, path in steps if step is not None), reverse=True)


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match else None


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob("step-*.tmp-*"):
        drop(path)


def _set_aside(path: Path) -> Path:
    aside, count = path.with_name(f"{path.name}.corrupt"), 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}.corrupt-{count}")
    return path.rename(aside)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fault(path: Path) -> str | None:
    """What is wrong with a step directory, in words, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be read: {error}"
    if not isinstance(manifest, dict) or manifest.keys() != {"format", "step", "files"}:
        return "manifest.json is not a manifest"
    if manifest["format"] not in _READ:
        return f"its format is {manifest['format']}, not {' or '.join(map(str, _READ))}"
    if manifest["step"] != _step(path):
        return f"manifest.json is that of step {manifest['step']}"
    if not isinstance(manifest["files"], dict):
        return "manifest.json is not a manifest"
    files: dict[str, Any] = manifest["files"]
    present = {entry.name for entry in path.iterdir()} - {"manifest.json"}
    if missing := sorted(files.keys() - present):
        return f"{missing[0]} is missing"
    if extra := sorted(present - files.keys()):
        return f"{extra[0]} does not belong to it"
    return next((fault for name in sorted(files) if (fault := _file_fault(path / name, files[name]))), None)


def _file_fault(path: Path, entry: Any) -> str | None:
    try:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, digest).hexdigest()
            found = {"bytes": file.tell(), "blake2b": content}
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    if found == entry:
        return None
    if isinstance(entry, dict) and entry.get("bytes") != found["bytes"]:
        return f"{path.name} has {found['bytes']} bytes, not {entry.get('bytes')}"
    return f"the content of {path.name} has changed"
