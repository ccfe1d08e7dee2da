"""Medley's data as open_clip_train reads it: tar shards of one image and one caption each.

A sample with several captions becomes as many pairs, for of several captions open_clip_train reads none but
the one in KEY.txt. The pairs lie in random order: its shuffle buffer would otherwise hold all captions of few
images, which are false negatives of each other.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

from torchvision.io import encode_png

from datasets.annotations import annotated
from datasets.atomic import replace
from datasets.decode import decode
from datasets.errors import ContentError
from datasets.shards import Entry, Shard, expand

_PER_SHARD = 500


def write_pairs(patterns: str, folder: Path) -> str:
    """Write the pairs that `patterns` name, once; returns the brace range of the shards.

    Samples that Medley would mask are left out. JPEG files are copied byte by byte; PNG and WebP are written
    as Medley decodes them, because open_clip_train shows transparent pixels in whatever colour they have.
    """
    count = folder / "count.json"
    if not count.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pairs = [
            (shard, entry, caption)
            for shard, entry in _samples(patterns)
            for caption in _captions(shard, entry)
        ]
        random.Random(0).shuffle(pairs)
        for number, first in enumerate(range(0, len(pairs), _PER_SHARD)):
            with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
                for place, pair in enumerate(pairs[first : first + _PER_SHARD], start=first):
                    _add(tar, place, *pair)
        replace(count, json.dumps(len(pairs)).encode())
    last = (json.loads(count.read_bytes()) - 1) // _PER_SHARD
    return f"{folder}/{{00000..{last:05d}}}.tar"


def _samples(patterns: str) -> Iterator[tuple[Shard, Entry]]:
    for path in expand(patterns):
        shard = Shard(path)
        yield from ((shard, entry) for entry in shard.entries)


def _captions(shard: Shard, entry: Entry) -> tuple[str, ...]:
    if entry.fault:
        return ()
    text = None if entry.text is None else shard.read(entry.text)
    record = None if entry.record is None else shard.read(entry.record)
    try:
        return annotated(text, record).captions
    except ContentError:
        return ()


def _add(tar: tarfile.TarFile, place: int, shard: Shard, entry: Entry, caption: str) -> None:
    assert entry.image is not None
    image, suffix = shard.read(entry.image), "jpg"
    if not entry.image.name.lower().endswith(("jpg", "jpeg")):
        image, suffix = bytes(encode_png(decode(image)).numpy()), "png"
    for kind, content in ((suffix, image), ("txt", caption.encode())):
        member = tarfile.TarInfo(f"{place:09d}.{kind}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
