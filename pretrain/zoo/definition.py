"""What an open_clip model is: the configuration that a name, a file, a directory or the hub gives."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets import hub
from datasets.errors import UserError

CONFIG = "open_clip_config.json"
"""In a directory and on the hub: a model's configuration, and how its pixels were normalised."""
WEIGHTS = "open_clip_model.safetensors"
"""Beside it: the weights."""


class Pixels(NamedTuple):
    """How a model wants its pixels, which are numbers in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A model of open_clip before it is built."""

    name: str
    """As it was asked for."""
    config: dict[str, Any]
    """`embed_dim`, `vision_cfg`, `text_cfg` and so on: what open_clip calls model_cfg."""
    pixels: Pixels | None
    """Where it says so."""
    folder: Path | None
    """Where it was found, if weights and a tokenizer may lie beside it."""

    def tokenizer(self, *, pretrained: str) -> str:
        """The tokenizer of transformers that it was made for, a directory or a name; empty for CLIP's own.

        Where the model or its weights (`pretrained`) are a directory, the one in there goes before the one
        of that name on the hub: as in open_clip, what is exported with its tokenizer does not ask for it.
        """
        named: str = self.config["text_cfg"].get("hf_tokenizer_name") or ""
        folders = [self.folder, Path(pretrained).expanduser() if pretrained else None]
        beside = [
            folder for folder in folders if folder is not None and (folder / "tokenizer.json").is_file()
        ]
        return str(beside[0]) if named and beside else named


def define(name: str) -> Definition:
    """The model of that name.

    Args:
        name: one of `open_clip.list_models()`; a .json file in the form of open_clip's own configurations;
            a directory with an open_clip_config.json; or hf-hub:ORG/NAME.

    Raises:
        UserError: there is no such model, or what is there is no configuration.
    """
    path = Path(name).expanduser()
    if name.startswith(hub.PREFIX):
        return read_definition(fetch_beside(name, CONFIG), name=name)
    if path.suffix == ".json":
        return read_definition(path, name=name)
    if "/" not in name:
        import open_clip

        config = open_clip.get_model_config(name)
        if config is not None:
            return Definition(name=name, config=config, pixels=None, folder=None)
        if not path.is_dir():
            refuse_unknown(name, open_clip.list_models(), library="open_clip")
    return read_definition(path / CONFIG, name=name, folder=path)


def read_definition(path: Path, *, name: str, folder: Path | None = None) -> Definition:
    """Read a configuration file, bare or with its preprocessing as in an open_clip_config.json.

    Raises:
        UserError: it is not there, or is no configuration.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"open_clip:{name} cannot be read: {error.strerror}: {path}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    data = _mapping(data)
    config = _mapping(data.get("model_cfg", data))
    wanted = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    if not all(isinstance(config.get(key), kind) for key, kind in wanted.items()):
        raise UserError(f"{path} is no configuration of an open_clip model: it needs {', '.join(wanted)}")
    seen = _mapping(data.get("preprocess_cfg"))
    mean, std = seen.get("mean"), seen.get("std")
    pixels = None if mean is None or std is None else read_pixels(path, mean=mean, std=std)
    return Definition(name=name, config=config, pixels=pixels, folder=folder)


def read_pixels(path: Path, *, mean: Any, std: Any) -> Pixels:
    """How a file says that pixels are normalised.

    Raises:
        UserError: it does not say it for each of the three colours.
    """
    for key, value in (("mean", mean), ("std", std)):
        listed = isinstance(value, list | tuple) and len(value) == 3
        if not (listed and all(type(number) in (int, float) for number in value)):
            raise UserError(
                f"{path} says that the {key} of the pixels is {value!r}: write a list of 3 numbers, one for "
                "each of red, green and blue"
            )
    return Pixels(tuple(mean), tuple(std))


def _mapping(data: Any) -> dict[str, Any]:
    return data if isinstance(data, dict) else {}


def fetch_beside(repository: str, file: str) -> Path:
    """A file of an open_clip model on the hub.

    Raises:
        UserError: it is neither there nor in the cache, or the hub cannot be reached.
    """
    instead = f"name a local directory with {CONFIG} and {WEIGHTS} in its place"
    return hub.fetch(repository, file, instead=instead)


def refuse_unknown(name: str, known: Iterable[str], *, library: str) -> None:
    """Refuse a name that is not among those of a library.

    Raises:
        UserError: names the nearest one.
    """
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {library}:{near[0]}?" if near else f"{library}.list_models() names them"
    raise UserError(f"{library}:{name} is unknown: {hint}")
