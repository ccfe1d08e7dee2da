"""Paths that begin with a home folder."""

from __future__ import annotations

from pathlib import Path

from datasets.errors import UserError


def at_home(path: str | Path) -> Path:
    """A path with the `~` or `~user` at its beginning written out; raises UserError if it is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} begins with a home folder that is not known: write it out") from error
