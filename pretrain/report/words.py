"""Numbers as people read them."""

from __future__ import annotations

from datetime import datetime


def count(value: float) -> str:
    """6400 as 6,400, and from a million on 12.8M."""
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """The two largest units: 2 h 13 min."""
    left = round(seconds)
    for large, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if left >= size:
            return f"{left // size} {large} {left % size // part} {small}"
    return f"{left} s"


def score(value: float) -> str:
    """A measured value: shares to three places, larger ones to four digits."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def share(value: float) -> str:
    """A share of one in percent; what is not nothing never looks like it."""
    return "< 0.1%" if 0 < value < 0.001 else f"{value:.1%}"


def date(seconds: float) -> str:
    """Unix seconds as the local time of this machine."""
    return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M %Z}"
