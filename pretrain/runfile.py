"""Run <-> run.yaml: plain data, read without executing anything, unknown keys refused.

Where a field holds one of several kinds (an objective, a model), its mapping says `kind: NAME`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from datasets.errors import UserError
from objectives import kind_of, objective_class
from objectives.base import Objective
from pretrain.config import Run
from pretrain.zoo.models import ModelConfig, model_config_class, model_kind_of

BUDGETS = ("bad", "cadence", "eval", "loader_threads", "remote", "spread", "val", "wandb", "watchdog")
"""Keys of a run that may change from one start to the next, beside the steps of its stages."""

CHANGEABLE = ("deterministic", "pool", "precision", "seed", "shuffle", "sources", "stages")
"""Keys that may be changed on purpose (--allow-changed): weights and moments fit in spite of it."""


def dump(run: Run) -> str:
    """The run as YAML text."""
    return yaml.safe_dump(to_plain(run), sort_keys=False, width=110)


def load(path: Path) -> Run:
    """The run that a run.yaml describes.

    Raises:
        UserError: not readable, not YAML, or a key or value that a Run does not have.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as a run: {reason}") from error
    return _dataclass(Run, data, str(path))


def identity(run: Run) -> str:
    """Hex digest of what makes it this run and not another: all but its budgets and its cadence.

    Sources and objectives count in the order in which they are named: a step reads and adds them in it.
    The same command with more steps goes on in the same directory.
    """
    plain = to_plain(run)
    for key in BUDGETS:
        del plain[key]
    for stage in plain["stages"].values():
        del stage["steps"]
    return hashlib.blake2b(json.dumps(plain).encode(), digest_size=8).hexdigest()


def to_plain(value: Any) -> Any:
    """Dataclasses as mappings, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Objective.Config):
            return {"kind": kind_of(value), **plain}
        if isinstance(value, ModelConfig):
            return {"kind": model_kind_of(value), **plain}
        return plain
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


def _dataclass(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a mapping, found {data!r}")
    data = dict(data)
    if kind is Objective.Config:
        kind = objective_class(str(data.pop("kind", ""))).Config
    elif kind is ModelConfig:
        kind = model_config_class(str(data.pop("kind", "")))
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for key in data:
        if key not in names:
            near = get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
            raise UserError(f"{where}: unknown key {key!r}{hint}")
    try:
        return kind(**{key: _value(hints[key], item, f"{where}: {key}") for key, item in data.items()})
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error


def _value(kind: Any, item: Any, where: str) -> Any:
    """`item` as the annotated type, or a UserError that says what was expected."""
    if dataclasses.is_dataclass(kind):
        return _dataclass(typing.cast("type", kind), item, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and isinstance(item, dict):
        return {str(key): _value(arguments[1], value, f"{where}.{key}") for key, value in item.items()}
    if origin is tuple and isinstance(item, list):
        return _tuple(arguments, item, where)
    if origin in (typing.Union, types.UnionType):
        return _first(arguments, item, where)
    if kind is float and type(item) in (int, float):
        return float(item)
    fits = item in arguments if origin is typing.Literal else type(item) is kind
    if fits:
        return item
    raise UserError(f"{where}: expected {getattr(kind, '__name__', kind)}, found {item!r}")


def _tuple(arguments: tuple[Any, ...], items: list[Any], where: str) -> tuple[Any, ...]:
    inner = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
    if len(inner) != len(items):
        raise UserError(f"{where}: expected {len(inner)} values, found {items!r}")
    return tuple(_value(one, value, where) for one, value in zip(inner, items, strict=True))


def _first(options: tuple[Any, ...], item: Any, where: str) -> Any:
    for option in options:
        try:
            return _value(option, item, where)
        except UserError:
            continue
    raise UserError(f"{where}: expected one of {', '.join(map(str, options))}, found {item!r}")
