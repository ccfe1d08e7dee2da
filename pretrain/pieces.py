"""Tensors in pieces: each rank writes the parts that it holds, and reads the parts that it needs.

A file is plain safetensors. Where it holds parts of tensors, its header says where each lies in the whole,
under the key of `torch.distributed.checkpoint`, whose HuggingFaceStorageReader can read these files too:

    {"DCP_SHARDING_INFO": {NAME: {"saved_offsets": [2, 0], "shape": [8, 5]}}}

That library itself does not write them: it sends Python objects between the ranks while it saves, also from
the thread that an asynchronous save runs in, and hashes nothing; what no file covers it leaves as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from datasets.errors import UserError

Entry = Mapping[str, int | str]
"""What a manifest says of a file."""
digest = partial(hashlib.blake2b, digest_size=32)

_PLACES = "DCP_SHARDING_INFO"
_CHUNK = 16 * 2**20
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TYPES = {word: dtype for dtype, word in _NAMES.items()}


class Region(NamedTuple):
    """A box in a tensor."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def common(self, other: Region) -> Region | None:
        """What lies in both."""
        start = tuple(map(max, self.start, other.start))
        stops = [
            min(a + n, b + m)
            for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True)
        ]
        size = tuple(stop - first for first, stop in zip(start, stops, strict=True))
        return Region(start, size) if all(n > 0 for n in size) else None

    def within(self, other: Region) -> tuple[slice, ...]:
        """Where this lies in another that holds it."""
        return tuple(
            slice(a - b, a - b + n) for a, b, n in zip(self.start, other.start, self.size, strict=True)
        )


class Piece(NamedTuple):
    """A part of a tensor."""

    tensor: Tensor
    region: Region
    """Where it lies in the whole."""
    shape: tuple[int, ...]
    """Of the whole."""


def whole(shape: tuple[int, ...]) -> Region:
    """All of a tensor."""
    return Region((0,) * len(shape), shape)


def region_of(tensor: Tensor) -> Region:
    """The part of a tensor that this rank holds; all of it, unless it is sharded."""
    start, size = [0] * tensor.ndim, list(tensor.shape)
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for axis, (placement, at) in enumerate(zip(tensor.placements, _coordinates(tensor), strict=True)):
            if isinstance(placement, Shard):
                size[placement.dim], offset = Shard.local_shard_size_and_offset(
                    size[placement.dim], mesh.size(axis), at
                )
                start[placement.dim] += offset
        assert tuple(size) == tuple(tensor.to_local().shape), "sharded in another way than FSDP2 shards"
    return Region(tuple(start), tuple(size))


def is_mine(tensor: Tensor, *, zero: bool) -> bool:
    """Whether this rank writes its part: the first of those that hold the same; rank zero, if plain."""
    if not isinstance(tensor, DTensor):
        return zero
    held = zip(tensor.placements, _coordinates(tensor), strict=True)
    return all(at == 0 for placement, at in held if isinstance(placement, Replicate))


def stage(named: Mapping[str, Tensor], *, zero: bool) -> dict[str, Piece]:
    """Copy what this rank writes to host memory, so that training may go on while it is written."""
    pieces: dict[str, Piece] = {}
    for name, tensor in named.items():
        region = region_of(tensor)
        if is_mine(tensor, zero=zero) and (zero or prod(region.size) > 0):
            local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            # torch keeps pinned memory for the next time, so that only the first save pays for it.
            host = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            pieces[name] = Piece(host.copy_(local, non_blocking=True), region, tuple(tensor.shape))
    if any(tensor.is_cuda for tensor in named.values()):
        torch.cuda.synchronize()
    return pieces


class AbandonedError(Exception):
    """Nobody waits for this file any more."""


def write(path: Path, content: Iterator[bytes | memoryview], *, unwanted: Event | None = None) -> Entry:
    """Write and sync a new file; what the manifest says of it.

    Raises:
        AbandonedError: `unwanted` was set meanwhile.
    """
    found, size = digest(), 0
    with path.open("xb") as file:
        for part in content:
            for first in range(0, len(part), _CHUNK):
                if unwanted is not None and unwanted.is_set():
                    raise AbandonedError
                chunk = part[first : first + _CHUNK]
                file.write(chunk)
                found.update(chunk)
                size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "blake2b": found.hexdigest()}


def serialised(pieces: Mapping[str, Piece]) -> Iterator[bytes | memoryview]:
    """The safetensors file of some pieces in host memory, part by part: no second copy of them is made."""
    # Larger types first, so that each tensor lies at a multiple of its own size.
    names = sorted(pieces, key=lambda name: (-pieces[name].tensor.itemsize, name))
    stops = list(accumulate((pieces[name].tensor.nbytes for name in names), initial=0))
    header: dict[str, object] = {
        name: {
            "dtype": _NAMES[pieces[name].tensor.dtype],
            "shape": list(pieces[name].tensor.shape),
            "data_offsets": stops[at : at + 2],
        }
        for at, name in enumerate(names)
    }
    if any(piece.region != whole(piece.shape) for piece in pieces.values()):
        places = {
            name: {"saved_offsets": piece.region.start, "shape": piece.shape}
            for name, piece in pieces.items()
        }
        header["__metadata__"] = {_PLACES: json.dumps(places)}
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    yield len(words).to_bytes(8, "little") + words
    for name in names:
        yield pieces[name].tensor.reshape(-1).view(torch.uint8).numpy().data


def file_name(group: str, pieces: Mapping[str, Piece], rank: int) -> str:
    """`model.safetensors` where it holds the whole, else `model-00002.safetensors`."""
    if rank == 0 and all(piece.region == whole(piece.shape) for piece in pieces.values()):
        return f"{group}.safetensors"
    return f"{group}-{rank:05d}.safetensors"


class _Place(NamedTuple):
    file: Any
    region: Region


class _Saved(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    places: list[_Place]


class Saved:
    """The tensors of one group in a directory of pieces, read region by region.

    Raises:
        UserError: a file cannot be read.
    """

    def __init__(self, folder: Path, group: str) -> None:
        self._folder = folder
        self._tensors: dict[str, _Saved] = {}
        with readable(folder):
            for path in sorted(folder.glob(f"{group}*.safetensors")):
                if group_of(path) == group:
                    self._note(path)

    def _note(self, path: Path) -> None:
        file: Any = safe_open(path, "pt")
        places = json.loads((file.metadata() or {}).get(_PLACES, "{}"))
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            held = file.get_slice(name)
            size, dtype = tuple(held.get_shape()), held.get_dtype()
            start = tuple(places[name]["saved_offsets"]) if places else (0,) * len(size)
            shape = tuple(places[name]["shape"]) if places else size
            saved = self._tensors.setdefault(name, _Saved(shape, dtype, []))
            if (shape, dtype) != saved[:2]:
                raise ValueError(f"{path.name} holds a part of another {name} than the files before it")
            saved.places.append(_Place(file, Region(start, size)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def load(self) -> dict[str, Tensor]:
        """Name to whole tensor."""
        return {name: self.read(name) for name in self}

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """Host memory of its own with a region of a tensor, by default all of it.

        Raises:
            UserError: no file holds some of it.
        """
        saved = self._tensors[name]
        region = region or whole(saved.shape)
        with readable(self._folder):
            tensor, covered = torch.empty(region.size, dtype=_TYPES[saved.dtype]), 0
            for file, held in saved.places:
                common = region.common(held)
                if common is not None:
                    tensor[common.within(region)] = file.get_slice(name)[common.within(held)]
                    covered += prod(common.size)
            if covered != tensor.numel():
                raise ValueError(f"parts of {name} are missing")
        return tensor

    def like(self, name: str, here: Tensor | None) -> Tensor:
        """The tensor as this rank holds another of that shape: only its part of it where that is sharded."""
        if not isinstance(here, DTensor) or tuple(here.shape) != self._tensors[name].shape:
            return self.read(name)
        local = self.read(name, region_of(here)).to(here.device)
        return DTensor.from_local(
            local, here.device_mesh, here.placements, run_check=False, shape=here.shape, stride=here.stride()
        )


@contextmanager
def readable(folder: Path) -> Generator[None]:
    """Say in one sentence that a checkpoint cannot be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {folder} cannot be read ({error}): move it away to use the one before"
        ) from error


def group_of(path: Path) -> str:
    """The group whose tensors a file holds."""
    return re.sub(r"-\d{5}$", "", path.stem)


def _coordinates(tensor: DTensor) -> list[int]:
    coordinates = tensor.device_mesh.get_coordinate()
    assert coordinates is not None, "a tensor of other ranks"
    return list(coordinates)
