"""One HTTP request for a range, and what each answer means."""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING

from datasets.remote.answer import Answer, GoneError, PassingError

if TYPE_CHECKING:
    import httpx

_TRY_AGAIN = {408, 425, 429}
_UNKNOWN_NAME_ATTEMPTS = 6  # some seconds: a name server may be restarted, a name with a typo stays unknown
_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


@contextmanager
def ask(url: str, begin: int, end: int | None, *, within: float) -> Generator[Answer]:
    """Ask for [begin, end), or from `begin` to the end; connections are kept and shared by threads.

    Args:
        url: http or https; redirects are followed.
        begin: the first byte.
        end: the byte after the last, if known.
        within: seconds without a byte after which the connection is dropped.

    Raises:
        PassingError: no connection, no bytes, a reset, or an answer that says try again.
        GoneError: any other answer without the bytes.
    """
    import httpx

    headers = {"Range": f"bytes={begin}-{'' if end is None else end - 1}", "Accept-Encoding": "identity"}
    try:
        with _client(os.getpid()).stream("GET", url, headers=headers, timeout=within) as response:
            yield _answer(response, begin, end)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
        raise GoneError(str(error)) from error
    except httpx.TimeoutException as error:
        raise PassingError(f"no byte came for {within:.3g} s") from error
    except httpx.TransportError as error:
        raise _explained(error) from error


@cache
def _client(process: int) -> httpx.Client:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.Client(follow_redirects=True, limits=limits)


def _answer(response: httpx.Response, begin: int, end: int | None) -> Answer:
    status, said = response.status_code, f"the server said {response.status_code} {response.reason_phrase}"
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    total = int(found[3]) if found and found[3] != "*" else None
    told = response.headers.get("Content-Length", "")
    length = int(told) if told.isdecimal() else None
    if status == 206:
        if found and found[1] and (int(found[1]) != begin or (end is not None and int(found[2]) >= end)):
            raise PassingError(f"the server sent {found[0]} instead of the range it was asked for")
        return Answer(total, _ended(response.iter_raw(), length))
    if status == 200:  # the whole of it: a simple server knows no ranges
        return Answer(length, _skip(response.iter_raw(), begin))
    if status == 416 and total == begin == 0:
        return Answer(0, iter(()))
    if status in _TRY_AGAIN or status >= 500:
        raise PassingError(said, pause=_seconds(response.headers.get("Retry-After", "")))
    raise GoneError(said if total is None else f"{said}: it has {total} bytes")


def _ended(chunks: Iterator[bytes], length: int | None) -> Iterator[bytes]:
    """The same; the last one comes when the answer has ended, so that its connection can be used again."""
    came = 0
    for chunk in chunks:
        came += len(chunk)
        if came == length:
            next(chunks, None)
        yield chunk


def _skip(chunks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """What follows the first `count` bytes, with an empty chunk for each that is skipped: a sign of life."""
    for chunk in chunks:
        yield chunk[count:]
        count = max(count - len(chunk), 0)


def _seconds(retry_after: str) -> float:
    """What a server asks to wait: seconds or a date."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max((parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):  # no date, or one without a zone
        return 0.0


def _explained(error: httpx.TransportError) -> Exception:
    """A failed connection; that of a name or a certificate lies below two other exceptions."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return GoneError(f"its certificate is not accepted ({cause.verify_message})")
        if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
            return PassingError("its host is unknown", attempts=_UNKNOWN_NAME_ATTEMPTS)
        cause = cause.__cause__ or cause.__context__
    return PassingError(str(error) or type(error).__name__)
