"""Files from the hub of Hugging Face: those in the cache are taken, and a missing network is said at once.

The libraries that ask the hub try again for half a minute. Here it is asked once whether it is there.
"""

# pyright: reportUnknownVariableType=false
# (huggingface_hub is partly untyped)

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from datasets.errors import UserError

PREFIX = "hf-hub:"
"""How open_clip and timm write that a name is one of the hub."""
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_PATIENCE = 0.8
"""Seconds in which the hub has to answer."""


def fetch(repository: str, file: str, *, instead: str) -> Path:
    """One file of a repository.

    Args:
        repository: ORG/NAME, with or without `hf-hub:` before it.
        file: its name there.
        instead: how a user does without the hub; it ends the sentence that says what went wrong.

    Raises:
        UserError: no such repository or file, or it is not in the cache and the hub cannot be asked.
    """
    from huggingface_hub import hf_hub_download

    name = _checked(repository, instead)
    return _fetch(name, file, lambda: hf_hub_download(name, file), instead)


def fetch_folder(repository: str, file: str, *, beside: Iterable[str], instead: str) -> Path:
    """The folder of one file of a repository, in which others lie as well.

    Args:
        repository: as of `fetch`.
        file: what has to be there.
        beside: what is fetched with it if it is there.
        instead: as of `fetch`.

    Raises:
        UserError: as `fetch`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    name = _checked(repository, instead)

    def download() -> str:
        # The one that says that all are there comes last.
        for other in beside:
            with suppress(EntryNotFoundError):
                hf_hub_download(name, other)
        return hf_hub_download(name, file)

    return _fetch(name, file, download, instead).parent


def _checked(repository: str, instead: str) -> str:
    name = repository.removeprefix(PREFIX)
    if not _NAME.fullmatch(name):
        raise UserError(f"{repository} is neither here nor a name on the hub, ORG/NAME: {instead}")
    return name


def _fetch(repository: str, file: str, download: Callable[[], str], instead: str) -> Path:
    """The file from the cache, or what `download` gives if the hub is there."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    missing = f"{file} of {repository} is not in the cache of the hub"
    if HF_HUB_OFFLINE:
        raise UserError(f"{missing}, and HF_HUB_OFFLINE forbids to ask for it: {instead}")
    fault = _silence(hf_hub_url(repository, file))
    if fault is not None:
        raise UserError(
            f"{missing}, which cannot be reached ({fault}): fetch it where there is a network "
            f"(hf download {repository}), or {instead}"
        )
    try:
        return Path(download())
    except Exception as error:  # its own, or that of whichever library it asks with
        reason = _first_line(error)
        raise UserError(f"{repository} on the hub gives no {file} ({reason}): {instead}") from error


def _silence(url: str) -> str | None:
    """Why the hub does not answer; None if it does, be it with a refusal."""
    from huggingface_hub import get_session

    answers: SimpleQueue[str | None] = SimpleQueue()

    def ask() -> None:
        try:
            status = get_session().head(url, timeout=_PATIENCE).status_code
        except Exception as error:
            answers.put(_first_line(error))
        else:
            # A proxy without a network behind it answers so; the library would ask it again and again.
            answers.put(f"status {status}" if status >= 500 else None)

    # In a thread, because resolving a name knows no timeout; a daemon, because nobody waits for it.
    Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=_PATIENCE)
    except Empty:
        return "no answer within a second"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
