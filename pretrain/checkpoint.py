"""What a run remembers on disk: written beside, hashed, renamed; found again only if every byte verifies.

    checkpoints/step-00000500/
        model.safetensors  optimizer.safetensors    one file per group of tensors
        state.json                                  everything that is not a tensor
        manifest.json                               size and hash of each file above; written last

No file is ever unpickled. A directory is complete from the moment it has its name: it is written as
`step-NNNNNNNN.tmp-PID`, synced, and renamed. Only the process that holds the run directory's lock calls
`save`, `find` and `prune`; any process may `load` what that one found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from datasets.errors import UserError

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
"""What survives a round trip as it was; a tuple comes back as a list."""

FORMAT = 1
_digest = partial(hashlib.blake2b, digest_size=32)


class Contents(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, dict[str, Tensor]]
    """Group, then name, to a tensor in host memory."""
    state: dict[str, Any]
    """The JSON that was saved beside them."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory that verified when it was found."""

    folder: Path
    step: int
    """Optimizer steps done when it was saved."""

    def load(self) -> Contents:
        """Read it into fresh memory; nothing stays tied to the files."""
        try:
            tensors = {
                path.stem: {name: tensor.clone() for name, tensor in safetensors.load_file(path).items()}
                for path in sorted(self.folder.glob("*.safetensors"))
            }
            state = json.loads((self.folder / "state.json").read_bytes())
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"the checkpoint {self.folder} cannot be read ({error}): move it away to use the one before"
            ) from error
        return Contents(tensors, state)


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, JSON]
) -> Path:
    """Write the checkpoint of a step, all or nothing, and return its directory.

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
    target = folder / f"step-{step:08d}"
    beside = folder / f"{target.name}.tmp-{os.getpid()}"
    remembered = json.dumps(state, indent=1).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        if target.exists():
            if _fault(target) is None:
                return target
            _set_aside(target)
        beside.mkdir()
        files = {
            f"{group}.safetensors": _write(beside / f"{group}.safetensors", _serialised(named))
            for group, named in tensors.items()
        }
        files["state.json"] = _write(beside / "state.json", remembered)
        manifest = {"format": FORMAT, "step": step, "files": files}
        _write(beside / "manifest.json", json.dumps(manifest, indent=1).encode())
        _sync(beside)
        beside.replace(target)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(
            f"no checkpoint of step {step} could be written in {folder} ({error.strerror}): "
            "make room there or choose another --out; the earlier ones are untouched"
        ) from error
    return target


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


def prune(folder: Path, *, keep: int) -> None:
    """Remove checkpoints older than the last `keep` (at least 2) that verify."""
    assert keep >= 2, "with one checkpoint, damage to it would lose the run"
    steps = _newest_first(folder)
    if len(steps) <= keep:
        return
    verified = 0
    for _, path in steps:
        if verified == keep:
            # Renamed first, so that a kill half-way leaves rubbish rather than a damaged checkpoint.
            rubbish = folder / f"{path.name}.tmp-{os.getpid()}"
            path.rename(rubbish)
            shutil.rmtree(rubbish)
        elif _fault(path) is None:
            verified += 1


def _newest_first(folder: Path) -> list[tuple[int, Path]]:
    steps = ((_step(path), path) for path in folder.iterdir())
    return sorted(((step, path) for step, path in steps if step is not None), reverse=True)


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match else None


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob("step-*.tmp-*"):
        shutil.rmtree(path)


def _set_aside(path: Path) -> Path:
    aside, count = path.with_name(f"{path.name}.corrupt"), 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}.corrupt-{count}")
    return path.rename(aside)


def _serialised(named: Mapping[str, Tensor]) -> bytes:
    # safetensors refuses shared memory and strides, so each tensor gets plain host memory of its own.
    own = {
        name: torch.empty(each.shape, dtype=each.dtype).copy_(each.detach()) for name, each in named.items()
    }
    return safetensors.save(own)


def _write(path: Path, content: bytes) -> dict[str, int | str]:
    """Write and sync a file; return what the manifest says of it."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "blake2b": _digest(content).hexdigest()}


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
    if manifest["format"] != FORMAT:
        return f"its format is {manifest['format']}, not {FORMAT}"
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
            digest = hashlib.file_digest(file, _digest).hexdigest()
            found = {"bytes": file.tell(), "blake2b": digest}
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    if found == entry:
        return None
    if isinstance(entry, dict) and entry.get("bytes") != found["bytes"]:
        return f"{path.name} has {found['bytes']} bytes, not {entry.get('bytes')}"
    return f"the content of {path.name} has changed"
