"""The list of all shards of a source, in order: how many samples each holds, and a digest of its content.

In memory it is a few columns, not an object a shard: 150,000 shards take some 15 MB. On disk it is JSON, with
paths relative to itself, so that a folder with its manifest can be moved or served by HTTP as it is.
"""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from datasets.atomic import replace
from datasets.errors import UserError
from datasets.shards.patterns import named, once

_FORMAT = "medley manifest 1"
_FEW = 3  # differences that are named


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of a manifest."""

    url: str
    """Absolute local path, or http(s), s3 or gs URL."""
    label: str
    """Short and unique in the manifest: the path from the folder that all its shards share."""
    bytes: int
    samples: int
    digest: str
    """Hex, 128 bit, of the content (`sidecar.Table.digest`)."""
    sidecar: str
    """Absolute path or URL."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A damaged shard that the manifest does without."""

    label: str
    kind: str
    offset: int
    reason: str


class Manifest:
    """Shards in order. Sample `index` of the manifest is row `row` of shard `number`."""

    def __init__(
        self,
        root: str,
        labels: Iterable[str],
        *,
        bytes: Iterable[int],  # noqa: A002
        samples: Sequence[int],
        digests: bytes,
        sidecars: Iterable[str] = (),
        left_out: Sequence[LeftOut] = (),
    ) -> None:
        """Take shards in their order; `of` takes them one by one.

        Args:
            root: what the URLs of all shards begin with; nothing if that is nothing.
            labels: what they end with.
            bytes: of each shard.
            samples: in each shard.
            digests: 16 bytes for each shard.
            sidecars: paths or URLs; nothing where a sidecar lies beside its shard.
            left_out: damaged shards that the others were asked for without.
        """
        self.left_out = tuple(left_out)
        self._root = root
        self._labels = _Strings(labels)
        self._bytes = array("q", bytes)
        self._ends = array("q", np.cumsum(samples, dtype=np.int64).tobytes())
        self._digests = digests
        self._sidecars = _Strings(sidecars)
        self.size: int = self._ends[-1] if self._ends else 0
        """Samples."""
        self.fingerprint = self._fingerprint()
        """Hex, 128 bit: equal for equal content in the same order, wherever it lies."""

    @classmethod
    def of(cls, shards: Iterable[Shard], *, left_out: Sequence[LeftOut] = ()) -> Manifest:
        """A manifest of shards in their order; their labels are made anew, from their URLs.

        Raises:
            UserError: a shard is named twice.
        """
        listed = list(shards)
        urls = [each.url for each in listed]
        once(urls)
        root = shared(urls)
        return cls(
            root,
            (url[len(root) :] for url in urls),
            bytes=[each.bytes for each in listed],
            samples=[each.samples for each in listed],
            digests=bytes.fromhex("".join(each.digest for each in listed)),
            sidecars=("" if each.sidecar == f"{each.url}.idx" else each.sidecar for each in listed),
            left_out=left_out,
        )

    @classmethod
    def synthetic(cls, shards: int, samples: int) -> Manifest:
        """A manifest without data, to measure with: `shards` shards of `samples` samples each."""
        return cls(
            "/synthetic/",
            (f"{number:06d}.tar" for number in range(shards)),
            bytes=[samples * 50_000] * shards,
            samples=[samples] * shards,
            digests=b"".join(number.to_bytes(16, "big") for number in range(shards)),
        )

    def __len__(self) -> int:
        return len(self._bytes)

    def __iter__(self) -> Iterator[Shard]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Shard:
        if not 0 <= number < len(self):
            raise IndexError(number)
        label = self._labels[number]
        url = self._root + label
        return Shard(
            url,
            label,
            self._bytes[number],
            self._ends[number] - self.first(number),
            self._digests[16 * number : 16 * number + 16].hex(),
            (self._sidecars[number] if self._sidecars else "") or f"{url}.idx",
        )

    @property
    def total_bytes(self) -> int:
        """Of all shards."""
        return sum(self._bytes)

    @property
    def remote(self) -> bool:
        """Whether any shard is not a local file."""
        return any("://" in start for start in ([self._root] if self._root else self._labels))

    def locate(self, index: int) -> tuple[int, int]:
        """The shard and the row in it that hold a sample."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def first(self, number: int) -> int:
        """Index of a shard's first sample."""
        return self._ends[number - 1] if number else 0

    def difference(self, other: Manifest) -> str:
        """What `other`, of now, has that this, of then, had not; empty if nothing."""
        if self.fingerprint == other.fingerprint:
            return ""
        then = {shard.label: shard for shard in self}
        now = {shard.label: shard for shard in other}
        changed = [how for label in then if label in now and (how := _changed(then[label], now[label]))]
        few = changed[:_FEW]
        if len(changed) > _FEW:
            few.append(f"{len(changed) - _FEW} more changed")
        for labels, how in ((then.keys() - now.keys(), "gone"), (now.keys() - then.keys(), "new")):
            if labels:
                named = ", ".join(sorted(labels)[:_FEW]) + (", ..." if len(labels) > _FEW else "")
                few.append(f"{len(labels)} shard{'s' * (len(labels) > 1)} {how}: {named}")
        return "; ".join(few) or "the shards stand in another order"

    def save(self, path: Path) -> None:
        """Write it; what lies in the folder of `path` or below is named from there."""
        folder = f"{path.absolute().parent}/"
        sidecars = [sidecar.removeprefix(folder) for sidecar in self._sidecars]
        content: dict[str, Any] = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "size": self.size,
            "root": self._root.removeprefix(folder) if self._root else None,
            "left_out": [[each.label, each.kind, each.offset, each.reason] for each in self.left_out],
            "labels": list(self._labels),
            "bytes": self._bytes.tolist(),
            "samples": np.diff(np.array(self._ends, np.int64), prepend=0).tolist(),
            "digests": self._digests.hex(),
            "sidecars": sidecars if any(sidecars) else [],
        }
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
        replace(path, f"{{\n{lines}\n}}\n".encode())

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read a manifest from a local path or a URL.

        Raises:
            UserError: it cannot be read, or is none, or damaged.
        """
        where = str(path)
        if "://" in where:
            from datasets.remote.fetch import Remote, read_whole

            data, folder = read_whole(where, remote=Remote()), where.rpartition("/")[0] + "/"
        else:
            try:
                data, folder = Path(path).read_bytes(), f"{Path(path).absolute().parent}/"
            except OSError as error:
                raise UserError(f"cannot read {where}: {error.strerror}") from error
        try:
            return cls._of(json.loads(data), folder)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{where} is no manifest, or damaged ({error}): write one with `python -m datasets.index`"
            ) from error

    @classmethod
    def _of(cls, content: Any, folder: str) -> Manifest:
        """What a manifest file in `folder` says."""
        if content["format"] != _FORMAT:
            raise ValueError("of another version")
        root, labels = content["root"], map(_string, content["labels"])
        if root is None:  # the shards share no folder, and their labels are whole
            labels = (_whole(folder, label) for label in labels)
        manifest = cls(
            "" if root is None else _from(folder, _string(root)),
            labels,
            bytes=map(_count, content["bytes"]),
            samples=[_count(each) for each in content["samples"]],
            digests=bytes.fromhex(content["digests"]),
            sidecars=(_string(each) and _from(folder, each) for each in content["sidecars"]),
            left_out=[LeftOut(*each) for each in content["left_out"]],
        )
        if manifest.fingerprint != content["fingerprint"]:
            raise ValueError("its fingerprint is another")
        return manifest

    def _fingerprint(self) -> str:
        count = len(self._bytes)
        if not count == len(self._labels) == len(self._ends) == len(self._digests) / 16 or len(
            self._sidecars
        ) not in (0, count):
            raise ValueError("its columns have different lengths")
        hashed = blake2b(self._digests, digest_size=16)
        for column in (self._bytes, self._ends):
            hashed.update(np.array(column, "<i8").tobytes())
        self._labels.update(hashed)
        return hashed.hexdigest()


class _Strings:
    """Texts in one piece of memory; no object a text."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self._ends = array("q", np.cumsum([len(text) for text in encoded], dtype=np.int64).tobytes())
        self._all = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> str:
        begin = self._ends[number - 1] if number else 0
        return self._all[begin : self._ends[number]].decode("utf-8", "surrogateescape")

    def update(self, hashed: blake2b) -> None:
        """Feed all to a hash."""
        hashed.update(np.array(self._ends, "<i8").tobytes())
        hashed.update(self._all)


def shared(urls: list[str]) -> str:
    """The folder, with its slash, that paths or URLs share; nothing if there is none."""
    prefix = os.path.commonprefix(urls)  # noqa: RUF071 (a slash ends it)
    return prefix[: prefix.rfind("/") + 1]


def _from(folder: str, path: str) -> str:
    """A path or URL that is told from `folder`."""
    if path.startswith("/") and "://" in folder:
        raise ValueError(f"it came by network and names {path} here")
    return path if path.startswith("/") or "://" in path else folder + path


def _whole(folder: str, label: str) -> str:
    """A path or URL that needs no folder."""
    if _from(folder, label) != label:
        raise ValueError(f"{label} has no root")
    return label


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _changed(then: Shard, now: Shard) -> str:
    for name in ("bytes", "samples"):
        before, after = getattr(then, name), getattr(now, name)
        if before != after:
            return f"{then.label} ({name} {before} then, {after} now)"
    return f"{then.label} (other content of the same size)" if then.digest != now.digest else ""


def open_manifest(spec: str, *, say: Callable[[str], None] | None = None) -> Manifest:
    """The manifest of what is named; local shards that have no valid sidecar are indexed now.

    Args:
        spec: manifests (.json, paths or URLs) and local tar shards (paths, globs, brace ranges), with commas.
        say: told in a line what is indexed, if anything, and how far it is.

    Raises:
        UserError: nothing is found, a shard is damaged or named twice, there are no samples, or a remote
            shard is named without a manifest.
    """
    from datasets.shards import opening  # which indexes: reading a manifest needs none of that

    names = named(spec)
    if len(names) == 1 and opening.is_manifest(names[0]):
        manifest = Manifest.load(names[0])
    else:
        manifest = Manifest.of(opening.shards(names, say))
    if not manifest.size:
        raise UserError(
            f"{spec} has no samples: a sample is KEY.jpg (.jpeg, .png, .webp), KEY.txt, KEY.json or KEY.cls"
            + (opening.held(manifest))
        )
    return manifest
