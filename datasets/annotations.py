"""What is written beside an image: captions, phrase boxes and a class, in the layout of img2dataset.

`KEY.json` may hold `captions` (a list, or one text) or `caption`, and `boxes` of `{phrase, box_xyxy,
caption_index}` with coordinates in 0..1; where it names no caption (null, an empty text or list), `KEY.txt`
is the caption. Its `class` is the name of a class, its `class_id` or else `KEY.cls` the number, read where
there is no name. What has a class needs no caption.

The rules:

* Of a text, white space is collapsed, control characters (NUL too) are left out, and what follows the first
  LONGEST characters is cut. Nothing else is changed: emoji, combining marks, writing from right to left and
  HTML entities stay. A byte order mark is no part of the text.
* Of several captions or boxes, those that cannot be used are left out alone: a caption that is empty, not
  text, or holds half a surrogate pair; a box that is none, without a phrase, or of a caption left out.
* Where nothing remains of the captions, the boxes or the class that were given and are asked for, the sample
  is masked. So is one whose `.txt`, `.cls` or `.json` is not UTF-8, or whose `.json` is not a JSON object:
  better captions may have stood there. Of a name that a record holds twice, the last counts.

`Annotations.mended` says what was changed or left out of a sample that was not masked, to be counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from datasets.errors import ContentError
from datasets.sample import Phrase
from datasets.source import EVERYTHING, Field

LONGEST = 10_000
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # those that are not white space
_T = TypeVar("_T")
_TEXTS: frozenset[Field] = frozenset(("text", "boxes"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotations:
    """What is known about an image."""

    captions: tuple[str, ...] = ()
    phrases: tuple[Phrase, ...] = ()
    label: str | int | None = None
    mended: tuple[str, ...] = ()
    """`cut` or `control` for every text that was changed so, and the kind of everything left out."""


def annotated(
    text: bytes | None,
    record: bytes | None,
    number: bytes | None = None,
    *,
    fields: frozenset[Field] = EVERYTHING,
) -> Annotations:
    """What a sample's `.txt`, `.json` and `.cls` say, any of which may be missing.

    Args:
        text: the bytes of `KEY.txt`.
        record: those of `KEY.json`.
        number: those of `KEY.cls`.
        fields: what is asked for. What is wrong with anything else does not matter. Boxes are those of
            captions, which are read with them.

    Raises:
        ContentError: one of the rules masks the sample, or it has neither a caption nor a class.
    """
    asked = fields - {"image"}
    if not asked:
        return Annotations()
    given = {} if record is None else _record(record)
    mended: list[str] = []
    captions = _captions(given, text, mended) if asked & _TEXTS else {}
    phrases = _phrases(given.get("boxes"), captions, mended) if "boxes" in asked else ()
    label = _label(given, number, mended) if "label" in asked else None
    if not captions and label is None:
        if asked & _TEXTS:
            raise ContentError("no caption", kind="no_caption")
        raise ContentError("no class", kind="class")
    return Annotations(captions=tuple(captions.values()), phrases=phrases, label=label, mended=tuple(mended))


def _captions(record: dict[str, Any], text: bytes | None, mended: list[str]) -> dict[int, str]:
    """Those that can be used, by their place among all."""
    told = (record.get(name) for name in ("captions", "caption"))
    captions: object = next((one for one in told if one not in (None, "", [])), None)
    if captions is None:
        captions = [] if text is None else _utf8(text, ".txt")
    listed = cast("list[object]", captions) if isinstance(captions, list) else [captions]
    return _usable(listed, lambda caption, place: _clean(caption, f"caption {place}", mended), mended)


def _phrases(boxes: object, captions: dict[int, str], mended: list[str]) -> tuple[Phrase, ...]:
    if boxes is None:
        return ()
    if not isinstance(boxes, list):
        raise ContentError("its boxes are not a list", kind="box")
    places = {caption: place for place, caption in enumerate(captions)}

    def phrase(box: Any, number: int) -> Phrase:
        try:
            (x0, y0, x1, y1), place = box["box_xyxy"], places[box.get("caption_index", 0)]
            if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):
                raise ValueError
        except (
            TypeError,
            KeyError,
            ValueError,
            AttributeError,
        ) as error:  # whatever JSON may hold there
            why = f"box {number} is not x0, y0, x1, y1 in 0..1 of one of its captions"
            raise ContentError(why, kind="box") from error
        text = _clean(box.get("phrase"), f"phrase {number}", mended)
        return Phrase(text=text, box=(x0, y0, x1, y1), caption=place)

    return tuple(_usable(cast("list[Any]", boxes), phrase, mended).values())


def _label(record: dict[str, Any], cls: bytes | None, mended: list[str]) -> str | int | None:
    named = record.get("class")
    if named is not None:
        try:
            return _clean(named, "its class", mended)
        except ContentError as error:
            raise ContentError(str(error), kind="class") from error
    number: object = record.get("class_id")
    if number is None and cls is not None:
        text = _utf8(cls, ".cls").strip()
        number = int(text) if text.isdecimal() and len(text) < 10 else text
    if number is None or (type(number) is int and number >= 0):
        return number
    raise ContentError("its class is not a number from 0 on", kind="class")


def _usable(items: Iterable[Any], read: Callable[[Any, int], _T], mended: list[str]) -> dict[int, _T]:
    """What `read` makes of every item and its place, without those that it refuses, by place.

    Raises:
        ContentError: why the first is refused, where all are.
    """
    found: dict[int, _T] = {}
    refused: list[ContentError] = []
    for place, item in enumerate(items):
        try:
            found[place] = read(item, place)
        except ContentError as error:
            refused.append(error)
    if refused and not found:
        raise refused[0]
    mended += [error.kind for error in refused]
    return found


def _clean(text: object, which: str, mended: list[str]) -> str:
    if not isinstance(text, str):
        raise ContentError(f"{which} is not text", kind="not_text")
    kept, removed = _CONTROL.subn("", text[:LONGEST])
    cleaned = " ".join(kept.split())
    if not cleaned:
        raise ContentError(f"{which} is empty", kind="no_caption")
    if not cleaned.isascii() and any("\ud800" <= character <= "\udfff" for character in cleaned):
        # JSON can spell half a surrogate pair.
        raise ContentError(f"{which} is not Unicode", kind="utf8")
    mended += ["cut"] * (len(text) > LONGEST) + ["control"] * (removed > 0)
    return cleaned


def _record(data: bytes) -> dict[str, Any]:
    text = _utf8(data, ".json")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ContentError(f"its .json is not JSON: {error}", kind="json") from error
    if not isinstance(record, dict):
        raise ContentError("its .json is not an object", kind="json")
    return cast("dict[str, Any]", record)


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ContentError(f"its {where} is not UTF-8 (byte {error.start})", kind="utf8") from error
