"""Files from the hub of Hugging Face: those in the cache are taken, and a missing network is said at once.

The libraries that ask the hub try again for half a minute. Here it is asked once whether it is there: a
connection tells within a second whether there is a network, and only then an answer is waited for.
"""

# pyright: reportUnknownVariableType=false
# (huggingface_hub is partly untyped)

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from datasets.errors import UserError

PREFIX = "hf-hub:"
"""How open_clip and timm write that a name is one of the hub."""
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_PATIENCE = 0.8
"""Seconds in which its name has to be found and a connection to stand: without a network neither happens."""
_ANSWER = 10.0
"""Seconds that a hub which is there may take to answer; behind a proxy some need several."""


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

    faults: SimpleQueue[str | None] = SimpleQueue()

    def ask() -> None:
        try:
            socket.create_connection(_first_stop(url), timeout=_PATIENCE).close()
            faults.put(None)
            status = get_session().head(url, timeout=_ANSWER).status_code
        except Exception as error:
            faults.put(_first_line(error))
        else:
            # A proxy without a network behind it answers so; the library would ask it again and again.
            faults.put(f"status {status}" if status >= 500 else None)

    # In a thread, because resolving a name knows no timeout; a daemon, because nobody waits for it.
    Thread(target=ask, daemon=True).start()
    for awaited, seconds in (("connection", _PATIENCE), ("answer", _ANSWER)):
        try:
            fault = faults.get(timeout=seconds)
        except Empty:
            return f"no {awaited} within {seconds:g} s"
        if fault is not None:
            return fault
    return None


def _first_stop(url: str) -> tuple[str | None, int]:
    """Host and port that a request goes to first: those of the proxy, where the environment names one."""
    parts, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(parts.netloc):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme, 1080)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
