"""Ranges of objects in S3 and Google Cloud Storage, through fsspec, whose calls are given a time each.

Credentials, regions and endpoints are those of the library: environment, `~/.aws`, `~/.config/fsspec`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from threading import Thread
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from datasets.errors import UserError
from datasets.remote.answer import Answer, GoneError, PassingError

_BLOCK = 4 * 2**20  # bytes asked for at once: they arrive together, so a stall shows only as a missing block
_LIBRARY = {"s3": "s3fs", "gs": "gcsfs"}

T = TypeVar("T")


@contextmanager
def ask(url: str, begin: int, end: int | None, *, within: float) -> Generator[Answer]:
    """As `web.ask`; `within` is what one block of 4 MiB may take.

    Raises:
        PassingError: a call took too long or failed.
        GoneError: no such object, or no access.
        UserError: a library is missing.
    """
    try:
        found = _bounded(lambda: _find(url), within)
    except ImportError as error:
        scheme = urlsplit(url).scheme
        raise UserError(
            f"{scheme}:// needs {_LIBRARY[scheme]}: install it with `pip install -e '.[remote]'`"
        ) from error
    yield Answer(found.size, _blocks(found, begin, found.size if end is None else end, within))


class _Object(NamedTuple):
    system: Any
    path: str
    size: int


@lru_cache(4096)
def _find(url: str) -> _Object:
    """An object and its size, asked for once, and again after trouble."""
    core: Any = import_module("fsspec.core")
    system, path = core.url_to_fs(url)
    system.invalidate_cache(path)
    return _Object(system, path, int(system.info(path)["size"]))


def _blocks(found: _Object, begin: int, end: int, within: float) -> Iterator[bytes]:
    for at in range(begin, end, _BLOCK):
        upto = min(at + _BLOCK, end)
        try:
            block = _bounded(lambda at=at, upto=upto: _block(found, at, upto), within)
        except (PassingError, GoneError):
            _find.cache_clear()  # the next attempt sees what has become of it
            raise
        yield block
        if len(block) < upto - at:
            _find.cache_clear()
            return


def _block(found: _Object, begin: int, end: int) -> bytes:
    return bytes(found.system.cat_file(found.path, start=begin, end=end))


def _bounded(call: Callable[[], T], seconds: float) -> T:
    """What a call returns in time. One that does not is left behind: nothing can end it from outside."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # for the one who waits
            future.set_exception(error)

    Thread(target=run, name="bucket", daemon=True).start()
    try:
        return future.result(seconds)
    except FileNotFoundError as error:
        raise GoneError("there is no such object") from error
    except PermissionError as error:
        raise GoneError(f"access is refused ({error})") from error
    except ImportError:
        raise
    except TimeoutError as error:
        raise PassingError(f"no answer came for {seconds:.3g} s") from error
    except Exception as error:  # the libraries raise of their own; only what they say of credentials is final
        if "credential" in type(error).__name__.lower():
            raise GoneError(f"there are no credentials ({error})") from error
        raise PassingError(f"{type(error).__name__}: {error}") from error
