"""Weights of open_clip models: where they come from, and how a file of them is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from datasets import hub
from datasets.errors import UserError
from pretrain.zoo.definition import CONFIG, WEIGHTS, Definition, Pixels, fetch_beside, read_definition

if TYPE_CHECKING:
    from open_clip import CoCa, CustomTextCLIP

CONVERT = (
    'python -c "from open_clip.factory import load_state_dict as load; from safetensors.torch import '
    "save_file; save_file({{k: v.contiguous() for k, v in load('{old}').items()}}, '{new}')\""
)
"""The command that turns a pickled checkpoint of a trusted source into one that we read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Where weights come from, and what must hold for them to mean what they meant in training."""

    path: Callable[[], Path] | None
    """Gives the .safetensors file, which may have to be fetched; None for random weights."""
    pixels: Pixels
    quick_gelu: bool = False


def find_weights(definition: Definition, pretrained: str) -> Weights:
    """The weights that `pretrained` means for this model.

    Args:
        definition: the model.
        pretrained: a .safetensors file; a directory with an open_clip_model.safetensors; hf-hub:ORG/NAME;
            a tag that open_clip knows for this model. Empty: the weights that lie beside the model's
            configuration, if it is a directory that has some or on the hub, and random ones otherwise.

    Raises:
        UserError: there are no such weights, they are no safetensors, or their configuration is on a hub that
            cannot be reached.
    """
    import open_clip

    name, folder = definition.name, definition.folder
    beside = folder is not None and (folder / WEIGHTS).is_file()
    pretrained = pretrained or (name if beside or name.startswith(hub.PREFIX) else "")
    if not pretrained:
        return Weights(path=None, pixels=_pixels(definition))
    if open_clip.is_pretrained_cfg(name, pretrained):
        tag = open_clip.get_pretrained_cfg(name, pretrained)
        pixels = Pixels(tuple(tag["mean"]), tuple(tag["std"]))
        return Weights(path=partial(_of_tag, tag), pixels=pixels, quick_gelu=tag.get("quick_gelu", False))
    if pretrained.startswith(hub.PREFIX):
        described, path = fetch_beside(pretrained, CONFIG), partial(fetch_beside, pretrained, WEIGHTS)
    else:
        file = _local(name, pretrained)
        described, path = file.with_name(CONFIG), lambda: file
    if not described.is_file():
        return Weights(path=path, pixels=_pixels(definition))
    own = read_definition(described, name=pretrained)
    return Weights(
        path=path,
        pixels=own.pixels or _pixels(definition),
        quick_gelu=own.config.get("quick_gelu", False),
    )


def _pixels(definition: Definition) -> Pixels:
    """How weights see pixels that do not say it themselves.

    As the model's configuration says; else, where all published weights of a model agree (SigLIP), as they
    do; else as open_clip does.
    """
    import open_clip

    tags = [open_clip.get_pretrained_cfg(definition.name, tag) for tag in _tags(definition.name)]
    seen = {Pixels(tuple(tag["mean"]), tuple(tag["std"])) for tag in tags}
    default = Pixels(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    return definition.pixels or (seen.pop() if len(seen) == 1 else default)


def _tags(name: str) -> list[str]:
    import open_clip

    return open_clip.list_pretrained_tags_by_model(name)


def _of_tag(tag: dict[str, Any]) -> Path:
    """Fetch a tag's weights from the hub, as safetensors only."""
    repository, _, file = tag["hf_hub"].rpartition("/")
    file = str(PurePosixPath(file).with_suffix(".safetensors")) if file else WEIGHTS
    return hub.fetch(repository, file, instead="name a local .safetensors file: --model.pretrained PATH")


def _local(name: str, pretrained: str) -> Path:
    """The local file of that name, or in the directory of that name, if it is one that we read."""
    path = Path(pretrained).expanduser()
    if path.is_dir():
        path = path / WEIGHTS
        if not path.is_file():
            raise UserError(f"{pretrained} is a directory without {WEIGHTS}")
    if not path.is_file():
        tags = ", ".join(_tags(name)) or "none"
        raise UserError(
            f"{pretrained} is neither a file, a directory nor a tag of open_clip:{name} (its tags: {tags}); "
            f"a repository of the hub is written {hub.PREFIX}ORG/NAME"
        )
    if path.suffix != ".safetensors":
        command = CONVERT.format(old=path, new=path.with_suffix(".safetensors"))
        raise UserError(
            f"{path} is a pickle, which is never read here; if you trust its source, convert it: {command}"
        )
    return path


def load_weights(model: CustomTextCLIP | CoCa, path: Path, *, name: str) -> None:
    """Load a checkpoint through open_clip, which knows its older formats; every key must find its place.

    Raises:
        UserError: it is not safetensors, or of another model; names the first key that does not fit.
    """
    import open_clip
    from safetensors import SafetensorError, safe_open

    where = f"{path} does not fit {name}"
    try:
        with safe_open(path, "pt") as file:
            keys = {key.removeprefix("module.") for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    if "logit_scale" not in keys:
        raise UserError(f"{where}: it lacks the key logit_scale")
    if "logit_bias" in keys and model.logit_bias is None:
        raise UserError(f"{where}: it has the key logit_bias, so it belongs to a sigmoid model")
    try:
        result: Any = open_clip.load_checkpoint(model, str(path), strict=False)  # pyright: ignore[reportArgumentType]
    except (AssertionError, RuntimeError) as error:  # shapes: torch's list, or open_clip's own check
        raise UserError(f"{where}: {str(error).strip().splitlines()[-1].strip()}") from error
    strange, missing = result.unexpected_keys, result.missing_keys
    for misfits, fault in ((missing, "it lacks"), (strange, "the model has no place for")):
        if misfits:
            more = f" and {len(misfits) - 1} more keys" if len(misfits) > 1 else ""
            raise UserError(f"{where}: {fault} {misfits[0]}{more}")
