"""HTML as a tree, so that no text is ever pasted into markup, and the page that lets nothing in or out."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, tostring

_HERE = Path(__file__).parent
_COLOURS = 7
"""Of page.css; runs after them are drawn dashed."""
Child = Element | str | None
"""What an element holds; nothing where there is nothing to say."""


def node(tag: str, *children: Child, **attributes: str) -> Element:
    """An element with children in order and attributes like `class_="quiet"`; texts may hold anything."""
    element = Element(tag, {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child and len(element):
            element[-1].tail = (element[-1].tail or "") + child
        elif child:
            element.text = (element.text or "") + child
    return element


def table(head: list[Child], rows: list[list[Child]]) -> Element:
    """A table that scrolls by itself where the page is narrow; the first cell of a row is its heading."""
    return node(
        "div",
        node(
            "table",
            node("thead", node("tr", *(node("th", each, scope="col") for each in head))),
            node(
                "tbody",
                *(
                    node("tr", node("th", row[0], scope="row"), *(node("td", each) for each in row[1:]))
                    for row in rows
                ),
            ),
        ),
        class_="scroll",
    )


def look(run: int) -> str:
    """The classes that give a run its colour, as in page.js."""
    return f"run-{run % _COLOURS}" + (" dashed" if run >= _COLOURS else "")


def heads(names: Sequence[str]) -> list[Child]:
    """The names of the runs in their colours; where there is only one, it goes without saying."""
    if len(names) == 1:
        return [None]
    return [node("span", node("i", class_="swatch"), name, class_=look(i)) for i, name in enumerate(names)]


def side_by_side(names: Sequence[str], columns: Sequence[Mapping[str, Child]]) -> Element:
    """What is said of each run under its name; what is said of none has no row."""
    labels = dict.fromkeys(label for column in columns for label in column)
    return table([None, *heads(names)], [[label, *(each.get(label) for each in columns)] for label in labels])


def fold(summary: str, *children: Child) -> Element:
    """What is seen when it is asked for."""
    return node("details", node("summary", summary), *children)


def picture(path: Path, alt: str) -> Element | None:
    """A PNG inside the page, or nothing if there is none."""
    if not path.is_file():
        return None
    content = base64.b64encode(path.read_bytes()).decode()
    return node("img", src=f"data:image/png;base64,{content}", alt=alt, title=alt)


def document(title: str, *body: Child, data: Any) -> bytes:
    """The whole page.

    Its policy forbids every request, and every script and style but page.js and page.css.

    Args:
        title: of the window.
        body: what stands in it.
        data: what page.js draws, as plain data.
    """
    script, style = ((_HERE / name).read_text() for name in ("page.js", "page.css"))
    policy = f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}"
    # Inside a script nothing is escaped, so it may not hold what would end or comment it out.
    numbers = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = node(
        "html",
        node(
            "head",
            node("meta", charset="utf-8"),
            node("meta", http_equiv="Content-Security-Policy", content=policy),
            node("meta", name="viewport", content="width=device-width, initial-scale=1"),
            node("title", title),
            node("style", style),
        ),
        node(
            "body",
            *body,
            node("script", numbers, type="application/json"),
            node("script", script),
        ),
        lang="en",
    )
    # A lone surrogate, which JSON may hold, has no bytes in UTF-8.
    html = tostring(page, encoding="unicode", method="html").encode("utf-8", "replace")
    return b"<!doctype html>\n" + html


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
