"""Which members of a tar make a sample: `KEY.jpg`, `KEY.txt`, `KEY.json`, `KEY.cls`, wherever they stand.

The key is the name up to the last dot, folders included, so that `img.000.jpg` and `img.001.jpg` are two
samples. But where `a.jpg` stands, `a.seg.png` is a further member of `a` and no sample of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from datasets.shards.scan import Members, Problem

IMAGE, TEXT, RECORD, NUMBER = range(4)
PARTS = ("image", "text", "record", "number")
LARGEST = 64 << 20  # bytes of a member that is read
_SUFFIXES = {
    "jpg": IMAGE,
    "jpeg": IMAGE,
    "png": IMAGE,
    "webp": IMAGE,
    "txt": TEXT,
    "json": RECORD,
    "cls": NUMBER,
}
_Blame = dict[str, tuple[str, int, str]]  # by key: kind, which member, why


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of a shard in the order of their first members."""

    keys: list[str]
    """Printable and unique."""
    parts: tuple[list[int], list[int], list[int], list[int]]
    """For image, text, record and number: which member it is, or -1."""
    faults: dict[int, Problem]
    """By number: why a sample cannot be used, whatever is asked of it, and where that shows."""


def group(members: Members) -> Samples:
    """Sort members into samples."""
    keys, kinds = split(members)
    found: dict[str, list[int]] = {}
    blame: _Blame = {}
    odd, names, find = members.odd, members.names, found.get
    for number, key in enumerate(keys):
        part = kinds[number]
        if part < 0:
            continue
        entry = find(key)
        if entry is None:
            found[key] = entry = [-1, -1, -1, -1]
        before = entry[part]
        if before < 0:
            entry[part] = number
        else:
            reason = f"{printable(names[before])} and {printable(names[number])} are both its {PARTS[part]}"
            blame.setdefault(key, ("duplicate", number, reason))
        if odd and number in odd:
            reason = f"{printable(names[number])} is {odd[number]}, not a file"
            blame.setdefault(key, ("no file", number, reason))
    if members.sizes and max(members.sizes) > LARGEST:
        _blame_large(members, found, blame)
    return _samples(members, found, blame)


def split(members: Members) -> tuple[list[str], list[int]]:
    """The key of each member, and which part of the sample it is (-1: none)."""
    keys: list[str] = []
    kinds: list[int] = []
    dotted: list[int] = []
    for number, name in enumerate(members.names):
        key, _, suffix = name.rpartition(".")
        part = _SUFFIXES.get(suffix, -1)
        if part < 0:
            part = _SUFFIXES.get(suffix.lower(), -1)
        keys.append(key)
        kinds.append(part)
        if "." in key or not key or key[-1] == "/":
            dotted.append(number)
    for number, what in members.odd.items():
        if what == "a folder":
            kinds[number] = -1
    if dotted:
        _undot(keys, kinds, dotted)
    return keys, kinds


def printable(name: str) -> str:
    """A member's name as it can be shown and logged: control characters and broken bytes are escaped."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _undot(keys: list[str], kinds: list[int], dotted: list[int]) -> None:
    """Hidden files are no parts; what hangs on another sample's key by a dot is a further member of it."""
    for number in dotted:
        base = keys[number].rpartition("/")[2]
        if not base or base[0] == ".":  # `._a.jpg` is what macOS writes beside `a.jpg`
            kinds[number] = -1
    standing = {key for key, part in zip(keys, kinds, strict=True) if part >= 0}
    for number in dotted:
        key = keys[number]
        at = key.find(".", key.rfind("/") + 2)
        while at >= 0:
            if key[:at] in standing:
                keys[number], kinds[number] = key[:at], -1
                break
            at = key.find(".", at + 1)


def _blame_large(members: Members, found: dict[str, list[int]], blame: _Blame) -> None:
    for key, entry in found.items():
        for part, number in enumerate(entry):
            if number >= 0 and (size := members.sizes[number]) > LARGEST:
                reason = f"{printable(members.names[number])} has {size} bytes, more than {LARGEST}"
                blame.setdefault(key, ("too large", number, reason))
                entry[part] = -1


def _samples(members: Members, found: dict[str, list[int]], blame: _Blame) -> Samples:
    columns = tuple([entry[part] for entry in found.values()] for part in range(4))
    keys = [printable(key) for key in found]
    if len(set(keys)) < len(keys):  # a broken byte, and the same written out as an escape
        seen: set[str] = set()
        for row, (raw, entry) in enumerate(found.items()):
            if keys[row] in seen:
                reason = f"another sample's name also reads {keys[row]}"
                blame.setdefault(raw, ("name", next(each for each in entry if each >= 0), reason))
                keys[row] = f"{keys[row]} ({row})"
            seen.add(keys[row])
    rows = {key: row for row, key in enumerate(found)} if blame else {}
    faults = {
        rows[raw]: Problem(kind, members.offsets[number], reason, keys[rows[raw]])
        for raw, (kind, number, reason) in blame.items()
    }
    return Samples(keys, (columns[0], columns[1], columns[2], columns[3]), faults)
