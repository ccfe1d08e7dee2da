"""Image-text pairs from tar shards in the layout of img2dataset and webdataset, local or remote.

A manifest says where every member of every shard lies, so that a sample is one read away and damage is found
before training. A sample that cannot be read keeps its slot, masked, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypedDict

from datasets.annotations import Annotations, annotated
from datasets.decode import decode
from datasets.errors import ContentError
from datasets.health import Meter
from datasets.remote.fetch import Remote
from datasets.sample import Fault, Phrase, Sample
from datasets.shards.grouping import printable
from datasets.shards.manifest import Manifest, open_manifest
from datasets.shards.sidecar import Place, Row
from datasets.shards.store import Store
from datasets.source import EVERYTHING, Field
from datasets.views import Augment, fixed_view, random_view

_GLANCE, _GLANCE_FAR = 64, 16  # samples that are looked at to find out what a source holds, or a remote one


class _Where(TypedDict):
    """What every sample says about itself."""

    key: str
    shard: str
    offset: int


class Tars:
    """The source that tar shards are; several comma-separated sets are one pooled source."""

    def __init__(
        self,
        spec: str,
        *,
        remote: Remote | None = None,
        meter: Meter | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Open the manifest; local shards without one are indexed first.

        Args:
            spec: what `open_manifest` takes: manifests, paths, globs and brace ranges, separated by commas.
            remote: how remote shards are fetched.
            meter: told what reading and decoding cost.
            say: told when shards have to be indexed first.

        Raises:
            UserError: nothing is found, a shard is damaged or no tar, or there is nothing to train on.
        """
        self.name = spec
        self.manifest: Manifest = open_manifest(spec, say=say)
        self.size: int | None = self.manifest.size
        self.fingerprint = self.manifest.fingerprint
        self.remote = self.manifest.remote
        self._meter = meter or Meter()
        self._store = Store(self.manifest, remote=remote or Remote(), meter=self._meter)
        self.fields: frozenset[Field] = self._held()

    def read(
        self,
        index: int,
        *,
        seed: tuple[int, ...],
        resolution: int,
        augment: Augment | None = None,
        fields: frozenset[Field] = EVERYTHING,
    ) -> Sample:
        """The sample at `index`: a view drawn by `seed`, or the central square."""
        number, row = self._find(index)
        shard = printable(self.manifest[number].label)
        here: _Where = {
            "key": f"{shard}/{row.key}",
            "shard": shard,
            "offset": min((place.offset for place in row.places), default=-1),
        }
        try:
            found = self._annotations(number, row, fields)
            if "image" not in fields:
                return Sample(image=None, captions=found.captions, label=found.label, **here)
            encoded = self._bytes(number, row.image, "no image")
            with self._meter.timed("decode", here["key"]):
                image = decode(encoded)
                height, width = image.shape[1:]
                if augment is None:
                    view = fixed_view(height, width)
                else:
                    view = random_view(height, width, augment=augment, key=seed)
                pixels = view.pixels(image, resolution=resolution)
        except ContentError as error:
            fault = Fault(error.kind, str(error), shard, here["offset"])
            return Sample(image=None, captions=(), fault=fault, **here)
        boxes = [(phrase, view.box(phrase.box)) for phrase in found.phrases]
        phrases = tuple(Phrase(text=each.text, box=box, caption=each.caption) for each, box in boxes if box)
        return Sample(
            image=pixels,
            captions=found.captions,
            phrases=phrases,
            cut_off=len(boxes) - len(phrases),
            label=found.label,
            **here,
        )

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of the sample at `index` without its pixels; none where they cannot be read."""
        try:
            return self._annotations(*self._find(index)).captions
        except ContentError:
            return ()

    def prefetch(self, index: int) -> None:
        """Begin to fetch the run of samples that holds `index`."""
        number, row = self.manifest.locate(index)
        self._store.prefetch(number, row, row + 1)

    def samples_of(self, label: str) -> int | None:
        """How many samples the shard of that label holds; None where there is none."""
        return self._samples_of.get(label)

    @cached_property
    def _samples_of(self) -> dict[str, int]:
        """Samples of each shard by its label: only made where a sample is bad."""
        return {printable(shard.label): shard.samples for shard in self.manifest}

    def close(self) -> None:
        """Close the shards; nothing can be read afterwards."""
        self._store.close()

    def _find(self, index: int) -> tuple[int, Row]:
        number, row = self.manifest.locate(index)
        return number, self._store.table(number)[row]

    def _annotations(self, number: int, row: Row, fields: frozenset[Field] = EVERYTHING) -> Annotations:
        if row.fault:
            raise ContentError(row.fault, kind="member")
        if not fields - {"image"}:
            return annotated(None, None, fields=fields)
        parts = (row.text, row.record, row.number)
        if not any(parts):
            raise ContentError("no .txt, .json or .cls beside its image", kind="missing")
        found = annotated(*(part and self._bytes(number, part) for part in parts), fields=fields)
        for kind in found.mended:
            self._meter.add(f"mended/{kind}")
        return found

    def _bytes(self, number: int, place: Place | None, missing: str = "") -> bytes:
        if place is None:
            raise ContentError(missing, kind="missing")
        return self._store.read(number, place)

    def _held(self) -> frozenset[Field]:
        """What a few samples from all over hold; one that cannot be read says so where it is met."""
        held: set[Field] = set()
        few = _GLANCE_FAR if self.remote else _GLANCE
        indices = range(0, self.manifest.size, max(1, self.manifest.size // few))
        for index in indices:
            self.prefetch(index)
        for index in indices:
            number, row = self._find(index)
            if row.image:
                held.add("image")
            try:
                found = self._annotations(number, row)
            except ContentError:
                continue
            if found.captions:
                held.add("text")
            if found.phrases:
                held.add("boxes")
            if found.label is not None:
                held.add("label")
        return frozenset(held)
