"""How every command of the repository begins and ends."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

_UNHEARD = 128 + signal.SIGPIPE
"""The exit code that shells know for a program whose reader has gone."""


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run this process's command line, and exit.

    Whoever reads what is printed may have read enough, as `head` and `less` do: that ends a command without a
    word. By the signal for it, as in other programs, also a lost worker or connection would end it so.

    Args:
        main: takes the arguments without the program's name; returns the exit code.
    """
    try:
        code = _code(main)
        sys.stdout.flush()
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
        if not gone:
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in gone:  # what they still hold is written as the interpreter ends
            os.dup2(nowhere, stream.fileno())
        code = _UNHEARD
    sys.exit(code)


def _code(main: Callable[[Sequence[str]], int]) -> int | str | None:
    """Also of one that exits by itself: after --help, and after flags that are refused."""
    try:
        return main(sys.argv[1:])
    except SystemExit as left:
        return left.code


def _is_unread(stream: TextIO) -> bool:
    """Whether the other end of a pipe has been closed."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
