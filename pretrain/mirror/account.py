"""What W&B's own settings and its login say. Where they are malformed that is a sentence, not a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from datasets.errors import UserError
from pretrain.sinks.mirrored import Wandb

_FOR_SERVERS = ("WANDB_API_KEY", "WANDB_BASE_URL")


def login() -> str | None:
    """The address of the server that there is an API key for; None without a key.

    Raises:
        UserError: the key cannot be one, or W&B's settings cannot be used.
    """
    import wandb

    with _mistakes():
        # First, because a login that meets malformed settings leaves them half loaded for the next use.
        settings = wandb.setup().settings
        return settings.base_url if wandb.login(prompt=False, verify=False) else None


def project_of(settings: Wandb) -> str:
    """The project: of a flag, of W&B's own settings and environment, or ours.

    Raises:
        UserError: W&B's settings cannot be used.
    """
    import wandb

    with _mistakes():
        return settings.project or wandb.setup().settings.project or "medley"


@contextmanager
def without_server() -> Iterator[None]:
    """Hide the environment's key and server: offline neither is needed, and a malformed one stops W&B."""
    hidden = {name: os.environ.pop(name) for name in _FOR_SERVERS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def one_line(error: Exception) -> str:
    """What an exception says, in a line that is not too long."""
    return " ".join(str(error).split())[:200]


@contextmanager
def _mistakes() -> Iterator[None]:
    import wandb
    from pydantic import ValidationError

    try:
        yield
    except (wandb.Error, ValidationError) as error:
        what = one_line(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = "".join(f"WANDB_{name}: ".upper() for name in first["loc"]) + first["msg"]
        raise UserError(
            f"W&B refuses its settings, {what.rstrip('.')}: mend the WANDB_ variable, or `wandb login` again"
        ) from error
