"""From a Run to the module that is trained: tokenizer, model, objectives, and the checks between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import ceil
from time import monotonic
from typing import get_args

import torch

from datasets.errors import UserError
from datasets.holding import GIVES
from datasets.loader import Feed
from datasets.order import RUN
from datasets.source import Field
from datasets.tokens import Tokenizer, TrainedBPE
from datasets.weights import turns, weight_at, weights_in
from objectives import kind_of, objective_class
from objectives.base import Objective, Tower, Widths
from pretrain.bystep import held_at, values_of
from pretrain.config import Run
from pretrain.curriculum import Curriculum, Stretch
from pretrain.distributed import Ranks
from pretrain.precision import choose_attention
from pretrain.pretrainer import Pretrainer
from pretrain.rundir import RunDir
from pretrain.trainable import set_trainable
from pretrain.zoo.dual import Dual
from pretrain.zoo.models import DualConfig, build_model, own_tokenizer
from pretrain.zoo.vision import fitting

_CAPTIONS_FOR_TOKENIZER = 20_000
_AHEAD = 32 * RUN  # samples whose captions are fetched while others are read
_SILENCE = 10.0  # seconds


def feeding(run: Run, feeds: Sequence[Feed], stage: str) -> dict[str, tuple[str, ...]]:
    """Of each source of a stage, the objectives that see its batches: those it names, or all it can feed.

    Raises:
        UserError: names an objective and what it needs, where a source or every source lacks it.
    """
    there = run.stages[stage]
    feeds = [feed for feed in feeds if not there.sources or feed.name in there.sources]
    minimised = [name for name in run.objectives if not there.objectives or name in there.objectives]
    where = f" of stage {stage!r}" if len(run.stages) > 1 else ""
    fed: dict[str, tuple[str, ...]] = {}
    for feed in feeds:
        named = run.sources[feed.name].objectives
        for name in named:
            _refuse_if_missing(run, name, feed)
        wanted = named or [name for name in run.objectives if not _missing(run, name, feed)]
        fed[feed.name] = tuple(name for name in wanted if name in minimised)
    for name in minimised:
        if not any(name in names for names in fed.values()):
            _refuse_if_missing(run, name, feeds[0])
            raise UserError(
                f"no source{where} feeds objective {name!r}: name it in a --sources.NAME.objectives"
            )
    for feed in feeds:
        if not fed[feed.name]:
            raise UserError(
                f"no objective{where or ' of this run'} can be fed with source {feed.name!r}, which gives "
                f"{', '.join(sorted(GIVES[feed.holding.holds]))}: leave it out, or add an objective"
            )
    return fed


def _missing(run: Run, objective: str, feed: Feed) -> frozenset[Field]:
    return objective_class(kind_of(run.objectives[objective])).needs - GIVES[feed.holding.holds]


def _refuse_if_missing(run: Run, objective: str, feed: Feed) -> None:
    missing, gives = _missing(run, objective, feed), GIVES[feed.holding.holds]
    if missing:
        raise UserError(
            f"objective {objective!r} needs {', '.join(sorted(missing))}, which {feed.source.name} does not "
            f"give as {feed.holding.holds}: that gives {', '.join(sorted(gives))}"
        )


def check_size(run: Run, feeds: Sequence[Feed]) -> None:
    """Refuse a source that has fewer samples than a step takes of it: one would stand in a batch twice.

    Raises:
        UserError: names the source and both sizes.
    """
    for stretch in Curriculum(run.stages).stretches:
        there = feeds_in(stretch, feeds)
        for feed in there:
            # What is owed beyond the share is less than a quantum for each source (`datasets.mixture`).
            carried = 0 if len(there) == 1 else len(there) * run.shuffle.lanes
            taken = min(stretch.batch, ceil(stretch.batch * _largest_share(feed, there, stretch)) + carried)
            if feed.source.size is not None and feed.source.size < taken:
                raise UserError(
                    f"{feed.source.name} has {feed.source.size} samples, too few for one batch that takes "
                    f"{taken} of them: choose a smaller batch or more data"
                )


def feeds_in(stretch: Stretch, feeds: Sequence[Feed]) -> list[Feed]:
    """The sources that are read in a stretch, with the weights that hold there."""
    own = {feed.name: feed.weight for feed in feeds}
    weights = weights_in(stretch.stage.sources, own, begins=stretch.begins)
    return [replace(feed, weight=weights[feed.name]) for feed in feeds if feed.name in weights]


def _largest_share(feed: Feed, feeds: Sequence[Feed], stretch: Stretch) -> float:
    """The largest share of a batch that a source ever has: between points of weights it rises or falls."""
    inside = {step for each in feeds for step in turns(each.weight) if stretch.first <= step < stretch.last}
    return max(
        weight_at(feed.weight, step) / sum(weight_at(each.weight, step) for each in feeds)
        for step in (stretch.first, *inside, stretch.last - 1)
    )


def build_tokenizer(
    run: Run,
    feeds: Sequence[Feed],
    rundir: RunDir,
    ranks: Ranks,
    *,
    say: Callable[[str], None] | None = None,
) -> Tokenizer:
    """The model's own tokenizer, or one trained on the data's captions and kept in the run directory.

    Args:
        run: which model, and how many words.
        feeds: the data.
        rundir: where it is kept.
        ranks: rank zero trains it.
        say: told how far reading the captions is, where that takes long.
    """
    own = own_tokenizer(run.model)
    if own is not None:
        return own
    assert isinstance(run.model, DualConfig)
    context_length = run.model.text.context_length
    ranks.on_zero(lambda: _train_tokenizer(run, feeds, rundir, context_length, say))
    return TrainedBPE.load(rundir.tokenizer)


def _train_tokenizer(
    run: Run,
    feeds: Sequence[Feed],
    rundir: RunDir,
    context_length: int,
    say: Callable[[str], None] | None,
) -> None:
    if rundir.tokenizer.exists():
        return
    each = -(-_CAPTIONS_FOR_TOKENIZER // len(feeds))
    captions = (caption for feed in feeds for caption in islice(_captions(feed), each))
    if say is not None:
        captions = _watched(captions, say)
    trained = TrainedBPE.train(captions, vocabulary=run.vocabulary, context_length=context_length)
    trained.save(rundir.tokenizer)


def _watched(captions: Iterator[str], say: Callable[[str], None]) -> Iterator[str]:
    """The same, with a sentence now and then."""
    said = monotonic()
    for number, caption in enumerate(captions):
        if monotonic() - said > _SILENCE:
            said = monotonic()
            say(f"reading captions for the vocabulary: {number:,} of at most {_CAPTIONS_FOR_TOKENIZER:,}")
        yield caption


def _captions(feed: Feed) -> Iterator[str]:
    """What a source has to say, in its own order."""
    size = _CAPTIONS_FOR_TOKENIZER if feed.source.size is None else feed.source.size
    for index in range(size):
        if feed.source.remote and index % RUN == 0:
            for later in range(index, min(index + _AHEAD, size), RUN):
                feed.source.prefetch(later)
        if feed.holding.holds == "classes":
            key = (0, 0, index)
            fields: frozenset[Field] = frozenset({"label"})
            sample = feed.source.read(index, seed=key, resolution=1, fields=fields)
            yield from feed.holding(sample, key).captions
        elif feed.holding.holds != "images":
            yield from feed.source.captions(index)


def build_pretrainer(
    run: Run,
    tokenizer: Tokenizer,
    ranks: Ranks,
    *,
    load: bool = True,
    feeds: Mapping[str, Sequence[str]] | None = None,
) -> Pretrainer:
    """Model and objectives with the weights that the run starts from, on this rank's device.

    Args:
        run: what to build.
        tokenizer: the run's.
        ranks: where to.
        load: False leaves out the weights that the run names (`pretrained`): a checkpoint has its own.
        feeds: of each source, the objectives that see its batches (`feeding`).

    Raises:
        UserError: the model cannot be built, or cannot give what an objective reads.
    """
    torch.manual_seed(run.seed)
    classes = {name: objective_class(kind_of(config)) for name, config in run.objectives.items()}
    # The model has one temperature. The first contrastive objective borrows it; others own theirs.
    borrower = next((name for name, owner in classes.items() if owner.temperature is not None), None)
    model = build_model(
        run.model,
        tokenizer=tokenizer,
        resolution=held_at(next(iter(run.stages.values())).resolution, 0),
        temperature=classes[borrower].temperature if borrower else None,
        load=load,
    )
    contrastive = {name for name, owner in classes.items() if owner.temperature is not None}
    objectives = {
        name: owner(
            run.objectives[name],
            widths_of(model, tokenizer, temperature=name == borrower, contrast=bool(contrastive - {name})),
        )
        for name, owner in classes.items()
    }
    check_fused(model, objectives)
    pretrainer = Pretrainer(model, objectives, ranks.group, feeds=feeds)
    check_written(tokenizer, objectives)
    for name, stage in run.stages.items():
        for resolution in values_of(stage.resolution):
            try_resolution(model, resolution, flag=f"--stages.{name}.resolution")
    drop_unread(model, objectives)
    choose_attention(model, ranks.device)
    # On a CPU it is there already, and parameters without storage (`pretrain.plan`) refuse to be moved.
    return pretrainer if ranks.device.type == "cpu" else pretrainer.to(ranks.device)


def try_resolution(model: Dual, resolution: int, *, flag: str) -> None:
    """Encode one black image, so that a later stage's resolution is refused now and not when it begins.

    Raises:
        UserError: the image tower does not work at this resolution.
    """
    with fitting(f"{flag}: the image tower", resolution), torch.no_grad():
        model.encode_image(torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8))


def widths_of(model: Dual, tokenizer: Tokenizer, *, temperature: bool, contrast: bool) -> Widths:
    """What an objective's heads need to know."""
    assert model.text is not None
    return Widths(
        embed=model.image.embed,
        image_tokens=model.image.width,
        text_tokens=model.text.width,
        vocabulary=tokenizer.vocabulary,
        temperature=temperature,
        contrast=contrast,
    )


def check_fused(model: Dual, objectives: Mapping[str, Objective]) -> None:
    """Refuse to look at images from a text tower that cannot.

    Raises:
        UserError: names the objective.
    """
    for name, objective in objectives.items():
        if model.fusion is None and "fusion" in towers_of(objective):
            raise UserError(
                f"objective {name!r} reads text and image together, and this model's text tower is one of "
                "transformers, whose blocks cannot look at an image: leave it out, or take a model with a "
                "text tower of open_clip's own, such as open_clip:ViT-B-32"
            )


def check_written(tokenizer: Tokenizer, objectives: Mapping[str, Objective]) -> None:
    """Refuse to learn to write texts that nothing opens: their first word would be asked of no state.

    Raises:
        UserError: names the objective.
    """
    for name, objective in objectives.items():
        if tokenizer.start is None and "captioner" in towers_of(objective):
            raise UserError(
                f"objective {name!r} predicts texts from their start token, and this model's tokenizer has "
                "none: leave it out, or take a model with CLIP's tokenizer, such as open_clip:ViT-B-32"
            )


def towers_of(objective: Objective) -> set[Tower]:
    """The towers whose passes an objective reads."""
    return {wanted.run[0] for wanted in objective.passes}


def read_by(model: Dual, objectives: Mapping[str, Objective]) -> set[Tower]:
    """The towers that run for these objectives: those whose passes they read, and those that these read."""
    runs = [wanted.run for objective in objectives.values() for wanted in objective.passes]
    towers: set[Tower] = {tower for tower, _, _ in runs}
    if any(image != "none" for _, image, _ in runs):
        towers.add("image")
    states = model.captioner is not None and model.captioner.reads_states
    if "fusion" in towers or ("captioner" in towers and states):
        towers.add("text")
    return towers


def drop_unread(model: Dual, objectives: Mapping[str, Objective]) -> None:
    """Leave out the parts that no objective reads: no memory, no optimizer step, no gradient to wait for."""
    read = read_by(model, objectives)
    model.captioner = model.captioner if "captioner" in read else None
    model.fusion = model.fusion if "fusion" in read else None
    model.text = model.text if "text" in read else None


def train_only(pretrainer: Pretrainer, run: Run, stage: str) -> dict[str, float]:
    """Freeze what no objective of a stage reads, and what the stage says; multipliers of the learning rate.

    No gradient is waited for then, and nothing decays without one. Objectives of other stages keep their
    heads, so that a checkpoint holds the same in every stage.

    Raises:
        UserError: a pattern of the stage matches nothing, or nothing that trains, or they freeze all of it.
    """
    fed = {name: pretrainer.objectives[name] for name in pretrainer.fed()}
    read = read_by(pretrainer.model, fed)
    for tower in get_args(Tower):
        if tower not in read and getattr(pretrainer.model, tower) is not None:
            getattr(pretrainer.model, tower).requires_grad_(False)
    for name, objective in pretrainer.objectives.items():
        if name not in fed:
            objective.requires_grad_(False)
    return set_trainable(pretrainer, run.stages[stage].trainable, flag=f"--stages.{stage}.trainable")


def trained_in(
    pretrainer: Pretrainer, run: Run, feeds: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[str, int]:
    """How many parameters train in each stage; what trains now is left as it was.

    Args:
        pretrainer: with all objectives of the run.
        run: the run.
        feeds: of each stage and source, the objectives that see its batches.

    Raises:
        UserError: what a stage says of its parameters does not fit them: known before days of training lead
            up to it.
    """
    flags = {each: each.requires_grad for each in pretrainer.parameters()}
    trained: dict[str, int] = {}
    for name in run.stages:
        here = Pretrainer(pretrainer.model, pretrainer.objectives, pretrainer.group, feeds=feeds[name])
        train_only(here, run, name)
        trained[name] = sum(each.numel() for each in flags if each.requires_grad)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return trained
