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
from pathlib import Path

from torchvision.io import encode_png

from datasets.annotations import annotated
from datasets.atomic import replace
from datasets.decode import decode
from datasets.errors import ContentError
from datasets.shards.manifest import open_manifest
from datasets.shards.store import Store

_PER_SHARD = 500
_JPEG = b"\xff\xd8"


def write_pairs(patterns: str, folder: Path) -> str:
    """Write the pairs that `patterns` name, once; returns the brace range of the shards.

    Samples that Medley would mask are left out. JPEG files are copied byte by byte; PNG and WebP are written
    as Medley decodes them, because open_clip_train shows transparent pixels in whatever colour they have.
    """
    count = folder / "count.json"
    if not count.exists():
        folder.mkdir(parents=True, exist_ok=True)
        manifest = open_manifest(patterns)
        store = Store(manifest)
        places = map(manifest.locate, range(manifest.size))
        pairs = [(place, caption) for place in places for caption in _captions(store, *place)]
        random.Random(0).shuffle(pairs)
        for number, first in enumerate(range(0, len(pairs), _PER_SHARD)):
            with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
                for key, (place, caption) in enumerate(pairs[first : first + _PER_SHARD], start=first):
                    _add(tar, key, _image(store, *place), caption)
        store.close()
        replace(count, json.dumps(len(pairs)).encode())
    last = (json.loads(count.read_bytes()) - 1) // _PER_SHARD
    return f"{folder}/{{00000..{last:05d}}}.tar"


def _captions(store: Store, number: int, row: int) -> tuple[str, ...]:
    sample = store.table(number)[row]
    if sample.fault or sample.image is None:
        return ()
    text, record = (part and store.read(number, part) for part in (sample.text, sample.record))
    try:
        return annotated(text, record).captions
    except ContentError:
        return ()


def _image(store: Store, number: int, row: int) -> bytes:
    """JPEG or PNG."""
    place = store.table(number)[row].image
    assert place is not None
    image = store.read(number, place)
    return image if image.startswith(_JPEG) else bytes(encode_png(decode(image)).numpy())


def _add(tar: tarfile.TarFile, key: int, image: bytes, caption: str) -> None:
    suffix = "jpg" if image.startswith(_JPEG) else "png"
    for kind, content in ((suffix, image), ("txt", caption.encode())):
        member = tarfile.TarInfo(f"{key:09d}.{kind}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
