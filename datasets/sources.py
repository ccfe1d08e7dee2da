"""From the words of a command line to sources, and to the mixture that a run reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from datasets.classes import Classes, load_classes
from datasets.errors import UserError
from datasets.health import Meter
from datasets.holding import NEEDS, Holding, Holds
from datasets.loader import Feed
from datasets.remote.fetch import Remote
from datasets.source import Field, Source
from datasets.weights import Weight, check_weight

_PLAIN = ("a photo of a {}.",)  # CLIP, arXiv 2103.00020, section 3.1.4


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of a run."""

    data: str = "scenes"
    """`scenes` (built in), or tar shards: a manifest, globs or brace ranges, several separated by commas."""
    holds: Holds = "captions"
    """What is taken of it: captioned images, phrases with boxes, text alone, images alone, or classes, which
    are put into sentences."""
    captions: Literal["one", "all"] = "one"
    """Of several captions (phrases, sentences): one drawn each time, or all beside their one image."""
    classes: str = ""
    """Of classes: `imagenet`, or a file with names, one a line, and lines with {} as sentences. Empty for the
    names that the data hold in one plain sentence."""
    weight: Weight = 1.0
    """Its share of every batch, relative to the others: a number, or STEP VALUE points with lines between."""
    objectives: tuple[str, ...] = ()
    """The objectives it feeds, by name; none for all that it can feed."""

    def check(self, flag: str) -> None:
        """Refuse settings that mean nothing.

        Raises:
            UserError: names the flag.
        """
        if not self.data:
            raise UserError("this recipe names no data: --data scenes, or --data 'shards/*.tar'")
        check_weight(self.weight, f"{flag}.weight")
        if self.classes and self.holds != "classes":
            raise UserError(f"{flag}.classes belongs to {flag}.holds classes, and that is {self.holds}")


def open_source(
    spec: str,
    *,
    seed: int,
    split: Literal["train", "test"],
    remote: Remote | None = None,
    meter: Meter | None = None,
    say: Callable[[str], None] | None = None,
) -> Source:
    """The source that `spec` names: `scenes`, or comma-separated tar shards, which are pooled.

    Args:
        spec: `scenes`, or what `datasets.shards.tars.Tars` takes.
        seed: of the run; the built-in scenes follow from it.
        split: which of the built-in scenes; shards are the split that their path says.
        remote: how remote shards are fetched.
        meter: told what reading and decoding cost.
        say: told when shards have to be indexed first.

    Raises:
        UserError: shards cannot be found or read.
    """
    if spec == "scenes":
        from datasets.scenes import Scenes

        return Scenes(seed=seed, split=split)
    from datasets.shards.tars import Tars

    return Tars(spec, remote=remote, meter=meter, say=say)


def open_mixture(
    sources: Mapping[str, SourceConfig],
    *,
    seed: int,
    remote: Remote,
    meter: Meter,
    say: Callable[[str], None] | None = None,
) -> tuple[Feed, ...]:
    """Every source of a run, opened for training, in the order they stand in a step.

    Raises:
        UserError: shards cannot be found or read, or hold not what is to be taken of them.
    """
    feeds: list[Feed] = []
    for name, config in sources.items():
        source = open_source(config.data, seed=seed, split="train", remote=remote, meter=meter, say=say)
        missing = NEEDS[config.holds] - source.fields
        if missing:
            raise UserError(
                f"--sources.{name}.holds {config.holds} needs {', '.join(sorted(missing))}, which "
                f"{source.name} does not hold; it holds "
                f"{', '.join(sorted(source.fields)) or 'nothing that is known'}"
            )
        holding = Holding(
            holds=config.holds,
            choose=config.captions,
            classes=_classes(name, config, source) if config.holds == "classes" else None,
        )
        feeds.append(Feed(name=name, source=source, holding=holding, weight=config.weight))
    return tuple(feeds)


def _classes(name: str, config: SourceConfig, source: Source) -> Classes:
    if config.classes:
        return load_classes(config.classes)
    only: frozenset[Field] = frozenset({"label"})
    first = (source.read(i, seed=(0,), resolution=1, fields=only) for i in range(source.size or 1))
    if isinstance(next((sample.label for sample in first if sample.label is not None), None), int):
        raise UserError(
            f"the classes of {source.name} are numbers: name them with --sources.{name}.classes, `imagenet` "
            "or a file with one name a line"
        )
    return Classes((), _PLAIN, source=source.name)
