"""From a Run to the module that is trained: tokenizer, model, objectives, and the checks between them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import torch

from datasets.errors import UserError
from datasets.source import Source
from datasets.tokens import Tokenizer, TrainedBPE
from objectives import kind_of, objective_class
from objectives.base import Objective, Tower, Widths
from pretrain.config import Run
from pretrain.distributed import Ranks
from pretrain.precision import choose_attention
from pretrain.pretrainer import Pretrainer
from pretrain.rundir import RunDir
from pretrain.zoo.dual import Dual
from pretrain.zoo.models import DualConfig, build_model, own_tokenizer
from pretrain.zoo.vision import fitting

_CAPTIONS_FOR_TOKENIZER = 20_000


def check_fed(run: Run, source: Source) -> None:
    """Refuse data that hold too little: too few samples, or not what an objective needs.

    Raises:
        UserError: names what there is and what is missing.
    """
    largest = max(stage.batch for stage in run.stages.values())
    if source.size is not None and source.size < largest:
        raise UserError(
            f"{source.name} has {source.size} samples, too few for one batch of {largest}: "
            "choose a smaller batch or more data"
        )
    for name, config in run.objectives.items():
        missing = objective_class(kind_of(config)).needs - source.fields
        if missing:
            raise UserError(
                f"objective {name!r} needs {', '.join(sorted(missing))}, which {source.name} does not hold; "
                f"it holds {', '.join(sorted(source.fields))}"
            )


def build_tokenizer(run: Run, source: Source, rundir: RunDir, ranks: Ranks) -> Tokenizer:
    """The model's own tokenizer, or one trained on the data's captions and kept in the run directory."""
    own = own_tokenizer(run.model)
    if own is not None:
        return own
    assert isinstance(run.model, DualConfig)
    context_length = run.model.text.context_length
    ranks.on_zero(lambda: _train_tokenizer(run, source, rundir, context_length))
    return TrainedBPE.load(rundir.tokenizer)


def _train_tokenizer(run: Run, source: Source, rundir: RunDir, context_length: int) -> None:
    if rundir.tokenizer.exists():
        return
    indices = range(_CAPTIONS_FOR_TOKENIZER if source.size is None else source.size)
    captions = (caption for index in indices for caption in source.captions(index))
    some = islice(captions, _CAPTIONS_FOR_TOKENIZER)
    trained = TrainedBPE.train(some, vocabulary=run.vocabulary, context_length=context_length)
    trained.save(rundir.tokenizer)


def build_pretrainer(run: Run, tokenizer: Tokenizer, ranks: Ranks, *, load: bool = True) -> Pretrainer:
    """Model and objectives with the weights that the run starts from, on this rank's device.

    Args:
        run: what to build.
        tokenizer: the run's.
        ranks: where to.
        load: False leaves out the weights that the run names (`pretrained`): a checkpoint has its own.

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
        resolution=next(iter(run.stages.values())).resolution,
        temperature=classes[borrower].temperature if borrower else None,
        load=load,
    )
    objectives = {
        name: owner(run.objectives[name], widths_of(model, tokenizer, temperature=name == borrower))
        for name, owner in classes.items()
    }
    pretrainer = Pretrainer(model, objectives, ranks.group)
    check_written(tokenizer, objectives)
    for stage in run.stages.values():
        try_resolution(model, stage.resolution)
    drop_unread(model, objectives)
    choose_attention(model, ranks.device)
    return pretrainer.to(ranks.device)


def try_resolution(model: Dual, resolution: int) -> None:
    """Encode one black image, so that a later stage's resolution is refused now and not when it begins.

    Raises:
        UserError: the image tower does not work at this resolution.
    """
    with fitting("the image tower", resolution), torch.no_grad():
        model.encode_image(torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8))


def widths_of(model: Dual, tokenizer: Tokenizer, *, temperature: bool) -> Widths:
    """What an objective's heads need to know."""
    assert model.text is not None
    return Widths(
        embed=model.image.embed,
        image_tokens=model.image.width,
        text_tokens=model.text.width,
        vocabulary=tokenizer.vocabulary,
        temperature=temperature,
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


def drop_unread(model: Dual, objectives: Mapping[str, Objective]) -> None:
    """Leave out the parts that no objective reads: no memory, no optimizer step, no gradient to wait for."""
    towers = {tower for objective in objectives.values() for tower in towers_of(objective)}
    if "captioner" not in towers:
        model.captioner = None
    if "text" not in towers and (model.captioner is None or not model.captioner.reads_states):
        model.text = None
