"""Export: `python -m pretrain.export runs/mine --to open_clip OUT`, or `--to transformers`.

Reads the newest checkpoint without touching the run, writes beside OUT, lets the library load what was
written and compares, and only then gives it its name. Exit codes: 0 done, 2 the user can mend it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from safetensors import SafetensorError

from datasets.commands import run
from datasets.errors import UserError
from pretrain.evaluate.subject import Subject, Weights, load_subject
from pretrain.export.card import Library, card
from pretrain.export.proof import TOLERANCE, Written, prove
from pretrain.export.to_open_clip import read_open_clip, write_open_clip
from pretrain.export.to_transformers import read_transformers, write_transformers
from pretrain.zoo.models import DualConfig

Part = Literal["captioner", "fusion", "logit_bias"]

Write = Callable[[Subject, Path], Sequence[str]]
Read = Callable[[Path], Written]
SIDES: dict[Library, tuple[Write, Read]] = {
    "open_clip": (write_open_clip, read_open_clip),
    "transformers": (write_transformers, read_transformers),
}
"""Of each library: what fills a directory, with notes for the card, and what reads it as its users do."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """Export the model of a run as a directory that another library loads."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """The run directory."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The directory to make."""
    to: Library
    """Who is to load it: open_clip, or transformers (CLIPModel, SiglipModel)."""
    step: int | None = None
    """The checkpoint to take; by default the newest."""
    weights: Weights = "ema"
    """`ema` for the moving average of the weights where the checkpoint has one, `raw` for those that were
    trained."""
    without: Annotated[tuple[Part, ...], tyro.conf.UseAppendAction] = ()
    """A part to leave out, where the library has no place for it."""


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    command = tyro.cli(Command, args=arguments, prog="python -m pretrain.export")
    if command.to == "transformers":
        from transformers.utils import logging

        logging.disable_progress_bar()  # one for each file that it writes or reads
        logging.set_verbosity_error()  # it warns of its own defaults; what we wrote is proven below
    try:
        export(
            command.run,
            command.out,
            to=command.to,
            step=command.step,
            weights=command.weights,
            without=command.without,
        )
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    proven = f"{command.to} says of it what the run says, to within {TOLERANCE}"
    sys.stdout.write(f"{command.out} is written: {proven}\n")
    return 0


def export(
    run: Path,
    out: Path,
    *,
    to: Library,
    step: int | None = None,
    weights: Weights = "ema",
    without: Sequence[Part] = (),
) -> None:
    """Write an export, all or nothing.

    Args:
        run: the run directory, which is only read.
        out: the directory to make; it may exist if it is empty.
        to: who is to load it.
        step: the checkpoint to take; by default the newest.
        weights: see `load_subject`.
        without: parts to leave out.

    Raises:
        UserError: there is no such checkpoint, the library has no shape for the model, it does not say of
            what was written what the run's model says, or `out` is taken or cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already: choose another OUT, or remove it first")
    subject = load_subject(run, step=step, weights=weights)
    if subject.run is None:
        raise UserError(f"{run} is an export already: name the run directory that it was made from")
    for part in without:
        setattr(subject.model, part, None)
    _refuse_ours(run, subject, to)
    write, read = SIDES[to]
    # In a directory that is there, so that a refusal leaves no empty ones behind.
    home = next(parent for parent in out.absolute().parents if parent.is_dir())
    beside = home / f".{out.name}.tmp-{os.getpid()}"
    try:
        beside.mkdir()
        notes = write(subject, beside)
        (beside / "README.md").write_text(card(subject, run, to=to, out=out, notes=notes), encoding="utf-8")
        for path in beside.iterdir():  # safetensors lets nobody else read what it writes
            path.chmod((beside / "README.md").stat().st_mode)
        prove(subject, read(beside))
        out.parent.mkdir(parents=True, exist_ok=True)
        beside.replace(out)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # not of the system: libraries raise it for what they cannot find
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{out} cannot be written ({reason}): choose another OUT") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _refuse_ours(run: Path, subject: Subject, to: Library) -> None:
    """Refuse what neither library has."""
    assert subject.run is not None
    if subject.model.text is None:
        raise UserError(
            f"{run} has trained no text tower ({', '.join(subject.run.objectives)} reads none), and {to} has "
            "no model without one: train it with itc or siglip"
        )
    if subject.model.fusion is not None:
        raise UserError(
            f"the text tower has learned to look at an image, and {to} has no place for that: leave it "
            "out, knowingly, with --without fusion"
        )
    if isinstance(subject.run.model, DualConfig) and subject.run.model.image == "small":
        raise UserError(
            f"the image tower 'small' begins with a convolutional stem of Medley's own, and {to} has no such "
            "tower: train one that it has, such as --model.image open_clip:ViT-S-32-alt"
        )


if __name__ == "__main__":
    run(main)
