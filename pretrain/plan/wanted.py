"""The flags of `--plan`: what a run is planned for, and what is assumed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from datasets.errors import UserError
from pretrain.config import Run
from pretrain.plan.gpus import DISK, GB, IMAGES_PER_CORE, UTILISATION, gpu_called

NOWHERE = "(not here)"
"""The data of a run that names none."""
HELP = """\
  --plan                   print what this run would take on GPUs that need not be here, and do nothing
  --gpus 8 --gpu h100      of the plan: how many, and which (a100-40, a100-80, h100, h200, b200)
  --gpus-per-node 8        of the plan: of one machine
  --utilisation 0.3        of the plan: the share of the GPUs' peak that the model's FLOPs reach
  --pairs 1.5e9            of the plan: samples in the data, which are then not looked for
  --caption-tokens 77      of the plan: the length of every caption
  --images-per-core 900    of the plan: what a core decodes in a second
  --disk-speed 2           of the plan: GB/s at which checkpoints are written"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a run is planned for."""

    gpus: int = 8
    gpu: str = "h100"
    gpus_per_node: int = 8
    utilisation: float = UTILISATION
    pairs: float = 0.0
    """Samples in the data; 0 to look at the data."""
    caption_tokens: int = 0
    """Of every caption; 0 for those of the data, or as many as the model reads."""
    images_per_core: float = IMAGES_PER_CORE
    disk_speed: float = DISK / GB

    def check(self) -> None:
        """Refuse what no plan can be made for.

        Raises:
            UserError: names the flag.
        """
        gpu_called(self.gpu)
        for name in ("gpus", "gpus_per_node", "images_per_core", "disk_speed"):
            if not getattr(self, name) > 0:
                raise UserError(f"{_flag(name)} is {getattr(self, name)}; it must be above 0")
        if not 0 < self.utilisation <= 1:
            raise UserError(f"--utilisation is {self.utilisation}; it is a share, above 0 and at most 1")
        if self.pairs < 0 or self.caption_tokens < 0 or self.caption_tokens == 1:
            raise UserError("--pairs is a number of samples, and --caption-tokens at least 2: start and end")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise UserError(
                f"--gpus {self.gpus} are not whole machines of --gpus-per-node {self.gpus_per_node}"
            )


def take(arguments: Sequence[str]) -> tuple[Wanted | None, list[str]]:
    """The flags of a plan, None without --plan, and all other arguments.

    Raises:
        UserError: flags of a plan without --plan, or values that mean nothing.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plan", action="store_true")
    for each in fields(Wanted):
        parser.add_argument(_flag(each.name), default=None)
    try:
        found, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from error
    given = {each.name: getattr(found, each.name) for each in fields(Wanted)}
    given = {name: value for name, value in given.items() if value is not None}
    if not found.plan:
        if given:
            raise UserError(f"{_flag(next(iter(given)))} belongs to --plan, which is not there")
        return None, others
    read: dict[str, Any] = {name: _value(name, value) for name, value in given.items()}
    wanted = Wanted(**read)
    wanted.check()
    return wanted, others


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _value(name: str, text: str) -> str | int | float:
    kind = type(getattr(Wanted(), name))
    try:
        return kind(text)
    except ValueError:
        whole = "a whole number" if kind is int else "a number"
        raise UserError(f"{_flag(name)} {text} is not {whole}") from None


def stand_in(run: Run) -> Run:
    """The run with a name for data that are nowhere named, so that it can be checked."""
    named = {name: replace(each, data=each.data or NOWHERE) for name, each in run.sources.items()}
    return replace(run, sources=named)
