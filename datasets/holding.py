"""What a run takes of a source's samples: captions, phrases with boxes, text, images, or classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from datasets.classes import Classes, normalise_name
from datasets.draws import draws
from datasets.errors import Kind
from datasets.sample import Fault, Phrase, Sample
from datasets.source import Field

Holds = Literal["captions", "phrases", "text", "images", "classes"]

NEEDS: Final[dict[Holds, frozenset[Field]]] = {
    "captions": frozenset(("image", "text")),
    "phrases": frozenset(("image", "text", "boxes")),
    "text": frozenset(("text",)),
    "images": frozenset(("image",)),
    "classes": frozenset(("image", "label")),
}
"""What a source must hold; nothing else of it is read."""
GIVES: Final[dict[Holds, frozenset[Field]]] = {**NEEDS, "classes": frozenset(("image", "text", "label"))}
"""What objectives find in the batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """How samples become what a batch is made of; every choice is drawn by the sample's key."""

    holds: Holds = "captions"
    choose: Literal["one", "all"] = "one"
    """Of several captions, phrases or templates: one drawn each time, or all beside their one image."""
    classes: Classes | None = None
    """Of `classes`: the templates, and the names where labels are numbers."""

    def __call__(self, sample: Sample, key: tuple[int, ...]) -> Sample:
        """The sample with the texts that are trained on, or a fault where it holds none of the kind.

        Args:
            sample: as its source gave it.
            key: (run seed, epoch, index).
        """
        if sample.fault:
            return sample
        if self.holds == "images":
            return replace(sample, captions=(), phrases=())
        if self.holds == "phrases":
            return self._phrases(sample, key)
        if self.holds == "classes":
            return self._named(sample, key)
        if not sample.captions:
            return _masked(sample, "no_caption", "no caption")
        chosen = self._chosen(len(sample.captions), key)
        return replace(
            sample,
            captions=tuple(sample.captions[i] for i in chosen),
            phrases=tuple(
                replace(phrase, caption=chosen.index(phrase.caption))
                for phrase in sample.phrases
                if phrase.caption in chosen
            ),
        )

    def _phrases(self, sample: Sample, key: tuple[int, ...]) -> Sample:
        """Every text is a phrase, with its box in the view. What the view cut off is no text at all."""
        if not sample.phrases and not sample.cut_off:
            return _masked(sample, "no_phrase", "no phrase with a box")
        chosen = [sample.phrases[i] for i in self._chosen(len(sample.phrases), key)]
        return replace(
            sample,
            captions=tuple(phrase.text for phrase in chosen),
            phrases=tuple(Phrase(text=p.text, box=p.box, caption=i) for i, p in enumerate(chosen)),
            boxes=tuple(phrase.box for phrase in chosen),
        )

    def _named(self, sample: Sample, key: tuple[int, ...]) -> Sample:
        assert self.classes is not None
        name, names = sample.label, self.classes.names
        if isinstance(name, int):
            if name >= len(names):
                return _masked(
                    sample, "class", f"its class {name} is none of the {len(names)} that have names"
                )
            name = names[name]
        elif name is not None and names and normalise_name(name) not in self.classes.normalised:
            return _masked(sample, "class", f"its class {name!r:.80} is none of the {len(names)} named")
        if name is None:
            return _masked(sample, "class", "no class")
        templates = [self.classes.templates[i] for i in self._chosen(len(self.classes.templates), key)]
        return replace(sample, captions=tuple(template.replace("{}", name) for template in templates))

    def _chosen(self, many: int, key: tuple[int, ...]) -> range:
        if self.choose == "all" or many < 2:
            return range(many)
        first = int(draws("caption", *key)[0] * many)
        return range(first, first + 1)


def _masked(sample: Sample, kind: Kind, reason: str) -> Sample:
    return replace(
        sample, image=None, captions=(), phrases=(), fault=Fault(kind, reason, sample.shard, sample.offset)
    )
