"""Image-text pairs from local tar shards in the layout of img2dataset and webdataset.

Opening reads the header of every member, so that a sample is one `pread` away from then on and damage is
found before training. A sample that cannot be read keeps its slot, masked, with the reason.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

from datasets.annotations import Annotations, annotated
from datasets.decode import decode
from datasets.errors import ContentError
from datasets.sample import Fault, Phrase, Sample
from datasets.shards import Entry, Member, Shard, expand
from datasets.source import Field
from datasets.views import Augment, fixed_view, random_view


class Tars:
    """The source that tar shards are; several comma-separated sets are one pooled source."""

    def __init__(self, patterns: str, *, augment: Augment) -> None:
        """Index all shards.

        Args:
            patterns: comma-separated paths, globs and brace ranges, such as `a/{00000..00011}.tar,b/*.tar`.
            augment: how random the views of training are.

        Raises:
            UserError: a pattern matches nothing, or a shard is no tar, damaged, or without pairs.
        """
        self.name = patterns
        self._augment = augment
        self._shards: list[Shard] = []
        try:
            for path in expand(patterns):
                self._shards.append(Shard(path))
        except BaseException:
            self.close()
            raise
        self._ends = list(accumulate(len(shard.entries) for shard in self._shards))
        self._labels = _labels([shard.path for shard in self._shards])
        self.size: int | None = self._ends[-1]
        self.fields: frozenset[Field] = frozenset(
            ("image", "text", "boxes") if _has_boxes(self._shards[0]) else ("image", "text")
        )
        self.fingerprint = _fingerprint(self._shards)

    def read(self, index: int, *, seed: tuple[int, ...], resolution: int, train: bool) -> Sample:
        """The sample at `index`: a view drawn by `seed` for training, the central square otherwise."""
        shard, entry, key = self._find(index)
        try:
            found = _annotations(shard, entry)
            assert entry.image is not None
            image = decode(shard.read(entry.image))
        except ContentError as error:
            fault = Fault(error.kind, str(error))
            return Sample(key=key, image=None, captions=(), fault=fault)
        height, width = image.shape[1:]
        if train:
            view = random_view(height, width, augment=self._augment, key=seed)
        else:
            view = fixed_view(height, width)
        boxes = ((phrase, view.box(phrase.box)) for phrase in found.phrases)
        return Sample(
            key=key,
            image=view.pixels(image, resolution=resolution),
            captions=found.captions,
            phrases=tuple(
                Phrase(text=phrase.text, box=box, caption=phrase.caption) for phrase, box in boxes if box
            ),
            label=found.label,
        )

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of the sample at `index` without its pixels; none where they cannot be read."""
        shard, entry, _ = self._find(index)
        try:
            return _annotations(shard, entry).captions
        except ContentError:
            return ()

    def close(self) -> None:
        """Close the shards; nothing can be read afterwards."""
        for shard in self._shards:
            shard.close()

    def _find(self, index: int) -> tuple[Shard, Entry, str]:
        """The shard and entry at `index`, and the key that names them."""
        assert 0 <= index < self._ends[-1], index
        place = bisect_right(self._ends, index)
        shard = self._shards[place]
        entry = shard.entries[index - self._ends[place]]  # counted from the back
        return shard, entry, f"{self._labels[place]}/{entry.key}"


def _annotations(shard: Shard, entry: Entry) -> Annotations:
    if entry.fault:
        raise ContentError(entry.fault, kind="member")

    def bytes_of(member: Member | None) -> bytes | None:
        return None if member is None else shard.read(member)

    return annotated(bytes_of(entry.text), bytes_of(entry.record), bytes_of(entry.number))


def _labels(paths: list[Path]) -> list[str]:
    """Short names of shards that tell them apart: their paths from the directory they share."""
    shared = os.path.commonpath([path.absolute().parent for path in paths])
    return [path.absolute().relative_to(shared).as_posix() for path in paths]


def _has_boxes(shard: Shard) -> bool:
    """Whether any sample of a shard has phrases with boxes."""
    for entry in shard.entries:
        try:
            if _annotations(shard, entry).phrases:
                return True
        except ContentError:
            continue  # it will be masked, with this reason, where it is read
    return False


def _fingerprint(shards: list[Shard]) -> str:
    """What tells one content from another: names, sizes and member tables, not the bytes themselves."""
    digest = blake2b(digest_size=16)
    for shard in shards:
        table = [(member.name, member.offset, member.size) for member in shard.members]
        digest.update(ascii((shard.path.name, shard.bytes, table)).encode())
    return digest.hexdigest()
