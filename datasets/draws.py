"""Random numbers that are named by a key instead of remembered by a generator."""

from __future__ import annotations

from hashlib import blake2b
from struct import Struct

_EIGHT = Struct("<8Q")


def draws(*key: int | str) -> tuple[float, ...]:
    """Eight numbers, uniform in [0, 1), that belong to `key`: the same in every process, thread and release.

    Two keys that differ anywhere have unrelated numbers, so `draws("crop", seed, epoch, index)` needs no
    state and does not care in which order samples are read.
    """
    return tuple((bits >> 11) * 2.0**-53 for bits in _EIGHT.unpack(blake2b(repr(key).encode()).digest()))
