"""Numbers and tables for people to read in a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def many(count: int, thing: str) -> str:
    """A count and its thing: 1 process, 2 processes."""
    plural = thing + ("es" if thing.endswith(("s", "ch")) else "s")
    return f"{count:,} {thing if count == 1 else plural}"


def share(part: int, whole: int) -> str:
    """Per cent of a whole."""
    return f"{part / whole:.0%}" if whole else "-"


def millions(count: int) -> str:
    """Parameters: exact where they are few."""
    return f"{count / 1e6:.3g} M" if count >= 1e5 else f"{count:,}"


def giga(flops: float) -> str:
    """FLOPs in units of 10^9."""
    return f"{flops / 1e9:,.3g}" if flops < 1e12 else f"{flops / 1e9:,.0f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns: words to the left, numbers to the right."""
    widths = [max(len(row[at]) for row in (heads, *rows)) for at in range(len(heads))]
    right = [all(row[at][:1].isdecimal() or not row[at] for row in rows) for at in range(len(heads))]
    return [
        "  "
        + "  ".join(
            f"{cell:>{width}}" if to_right else f"{cell:<{width}}"
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in (heads, *rows)
    ]
