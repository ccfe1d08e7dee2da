"""Reading a shard again, whole: against what was indexed, and for what other readers would stumble over."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

from datasets.errors import UserError
from datasets.remote.fetch import Remote, fetch_to, is_remote
from datasets.shards.grouping import IMAGE, PARTS, RECORD, Samples, group, printable, split
from datasets.shards.scan import Members, Problem, Scan, scan
from datasets.shards.sidecar import Place, Table, digest

_SHA256 = re.compile(rb'"sha256"\s*:\s*"([0-9a-f]{64})"')
_PROBE = 8  # samples that show whether their sha256 is that of the stored image
_CODE = re.compile(r"pyd|pkl|p(?:ickle)|dill|pth?", re.IGNORECASE)
"""Suffixes whose content webdataset and others load as objects, code included; here it is never read."""


class Wanted(NamedTuple):
    """A shard to check."""

    url: str
    sidecar: str
    """Path or URL, or nothing: it is not indexed yet."""
    digest: str
    """What its manifest says of it, or nothing."""


class Checked(NamedTuple):
    """What was found."""

    problems: list[Problem]
    samples: int
    bytes: int


def check_one(wanted: Wanted) -> Checked:
    """Read a shard from end to end, and compare; raises UserError if there is no room for a remote one."""
    with temporary() as folder:
        try:
            path = brought(wanted.url, folder / "shard.tar")
            found = scan(path)
        except UserError as error:
            return Checked([Problem("unreadable", 0, str(error))], 0, 0)
        samples = group(found.members)
        problems = [found.problem] if found.problem is not None else []
        problems += samples.faults.values()
        problems += _remarks(found.members)
        try:
            problems += _hashes(path, found.members, samples)
        except OSError as error:  # of a local one: it was read to its end a moment ago
            problems.append(Problem("unreadable", 0, f"it cannot be read again ({error.strerror})"))
        if wanted.sidecar:
            try:
                table = Table.open(brought(wanted.sidecar, folder / "shard.idx"))
            except UserError as error:
                problems.append(Problem("sidecar", 0, str(error)))
            else:
                problems += _compared(found, samples, table, wanted.digest)
    return Checked(problems, len(samples.keys), found.bytes)


@contextmanager
def temporary() -> Generator[Path]:
    """A folder for what is remote; an OSError, also within, becomes a UserError that says what to do."""
    try:
        with tempfile.TemporaryDirectory(prefix="medley-check-") as folder:
            yield Path(folder)
    except OSError as error:
        raise UserError(
            f"cannot write to the temporary folder {tempfile.tempdir or ''} ({error.strerror}): set TMPDIR "
            "to one with room for a shard a worker, or give fewer --workers"
        ) from error


def brought(url: str, path: Path) -> Path:
    """A local path, or that which a remote object was written to; raises as `fetch_to`."""
    if not is_remote(url):
        return Path(url)
    fetch_to(url, path, remote=Remote())
    return path


def _compared(found: Scan, samples: Samples, table: Table, expected: str) -> Iterator[Problem]:
    """How a shard differs from its sidecar, sample by sample."""
    if expected and table.digest != expected:
        yield Problem("sidecar", 0, "its sidecar is not the one that its manifest was written with")
    if table.digest == digest(found.members, found.bytes):
        return
    if table.bytes != found.bytes:
        yield Problem("changed", 0, f"it has {found.bytes} bytes and had {table.bytes} when it was indexed")
    now = dict(zip(found.members.offsets, range(len(found.members)), strict=True))
    whole = True
    for row in table:
        for part, place in zip(PARTS, row[1:5], strict=True):
            if not isinstance(place, Place):
                continue
            number = now.get(place.offset)
            if number is None or found.members.sizes[number] != place.size:
                whole = False
                yield Problem("lost", place.offset, f"its {part} is not where it was indexed", row.key)
                break
            if found.members.crcs[number] != place.crc:
                whole = False
                reason = f"the bytes of its {part} are not those that were indexed"
                yield Problem("checksum", place.offset, reason, row.key)
    if whole and table.bytes == found.bytes:
        yield Problem("changed", 0, "names, or members that belong to no sample, are not those indexed")


def _hashes(path: Path, members: Members, samples: Samples) -> Iterator[Problem]:
    """Images that are not those whose SHA-256 img2dataset wrote in their records.

    It hashes what it downloads, and stores that only if told not to resize or encode anew: where most of the
    first few differ, the hashes say nothing about what is stored.
    """
    pairs = zip(samples.keys, samples.parts[IMAGE], samples.parts[RECORD], strict=True)
    both = [(key, image, record) for key, image, record in pairs if image >= 0 and record >= 0]
    if not both:
        return
    with path.open("rb") as file:

        def read(number: int) -> bytes:
            file.seek(members.offsets[number])
            return file.read(members.sizes[number])

        wrong: list[Problem] = []
        told = 0
        for key, image, record in both:
            if told >= _PROBE and 2 * len(wrong) > told:
                return
            if (claimed := _SHA256.search(read(record))) is None:
                if told == 0:
                    return
                continue
            told += 1
            if sha256(read(image)).hexdigest() != claimed[1].decode():
                reason = "its image is not the one whose sha256 its record holds"
                wrong.append(Problem("checksum", members.offsets[image], reason, key))
    if 2 * len(wrong) <= told:
        yield from wrong


def _remarks(members: Members) -> Iterator[Problem]:
    """What is read right here, and wrongly or dangerously elsewhere."""
    keys, kinds = split(members)
    for number, name in enumerate(members.names):
        shown, at = printable(name), members.offsets[number]
        what = members.odd.get(number, "a folder")
        if shown != name:
            yield Problem("name", at, f"the name {shown} has broken or control characters")
        if name.startswith("/") or ".." in name.split("/"):
            yield Problem("name", at, f"the name {shown} leads out of the folder it is unpacked to")
        if what != "a folder" and kinds[number] < 0:
            yield Problem("no file", at, f"{shown} is {what}, not a file")
        if _CODE.fullmatch(name.rpartition(".")[2]):
            yield Problem(
                "code", at, f"{shown} can run code where other programs load it; it is not read here"
            )
    yield from _torn(members, keys, kinds)


def _torn(members: Members, keys: list[str], kinds: list[int]) -> Iterator[Problem]:
    """What webdataset takes together or apart: dots in a key, other samples between members."""
    last: dict[str, int] = {}
    torn: set[str] = set()
    runs = list(accumulate((key != before for before, key in pairwise(keys)), initial=0))
    for number, key in enumerate(keys):
        if kinds[number] < 0:
            continue
        at = members.offsets[number]
        if key not in last and "." in key.rpartition("/")[2]:
            reason = f"webdataset ends the key of {printable(members.names[number])} at the first dot"
            yield Problem("dots", at, reason, printable(key))
        if key in last and runs[last[key]] != runs[number] and key not in torn:
            torn.add(key)
            reason = "others stand between its members, at which webdataset tears it"
            yield Problem("interleaved", at, reason, printable(key))
        last[key] = number
