"""What is written beside an image: captions, phrase boxes and a class, in the layout of img2dataset.

`KEY.json` may hold `captions` (a list) or `caption`, and `boxes` of `{phrase, box_xyxy, caption_index}` with
coordinates in 0..1; where it names no caption, `KEY.txt` is the caption. Its `class` is the name of a class,
its `class_id` or else `KEY.cls` the number, read where there is no name. What has a class needs no caption.

The rules, each a reason to mask the sample when broken: UTF-8 throughout; captions are text and not empty.
Spaces and line ends are collapsed, control characters left out, and what follows the first LONGEST characters
is cut.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, cast

from datasets.errors import ContentError
from datasets.sample import Phrase

LONGEST = 10_000
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # those that are not white space


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotations:
    """What is known about an image."""

    captions: tuple[str, ...]
    phrases: tuple[Phrase, ...]
    label: str | int | None


def annotated(text: bytes | None, record: bytes | None, number: bytes | None = None) -> Annotations:
    """What a sample's `.txt`, `.json` and `.cls` say, any of which may be missing.

    Raises:
        ContentError: one of the rules is broken.
    """
    fields = {} if record is None else _record(record)
    label = _label(fields, number)
    captions: object = fields.get("captions") or fields.get("caption")
    if not captions and text is not None:
        captions = _utf8(text, ".txt")
    if not captions and label is not None:
        captions = []
    listed = cast("list[object]", captions) if isinstance(captions, list) else [captions]
    cleaned = tuple(_clean(caption, f"caption {number}") for number, caption in enumerate(listed))
    phrases = _phrases(fields.get("boxes") or [], captions=len(cleaned))
    return Annotations(captions=cleaned, phrases=phrases, label=label)


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


def _clean(caption: object, which: str) -> str:
    if caption is None:
        raise ContentError("no caption", kind="no_caption")
    if not isinstance(caption, str):
        raise ContentError(f"{which} is not text", kind="not_text")
    cleaned = " ".join(_CONTROL.sub("", caption[:LONGEST]).split())
    if not cleaned:
        raise ContentError(f"{which} is empty", kind="no_caption")
    if not cleaned.isascii() and any("\ud800" <= character <= "\udfff" for character in cleaned):
        # JSON can spell half a surrogate pair.
        raise ContentError(f"{which} is not Unicode", kind="utf8")
    return cleaned


def _label(fields: dict[str, Any], cls: bytes | None) -> str | int | None:
    named = fields.get("class")
    if named is not None:
        return _clean(named, "its class")
    number: object = fields.get("class_id")
    if number is None and cls is not None:
        text = _utf8(cls, ".cls").strip()
        number = int(text) if text.isdecimal() and len(text) < 10 else text
    if number is None or (type(number) is int and number >= 0):
        return number
    raise ContentError("its class is not a number from 0 on", kind="class")


def _phrases(boxes: object, *, captions: int) -> tuple[Phrase, ...]:
    if not isinstance(boxes, list):
        raise ContentError("its boxes are not a list", kind="box")
    return tuple(_phrase(box, number, captions) for number, box in enumerate(cast("list[Any]", boxes)))


def _phrase(box: Any, number: int, captions: int) -> Phrase:
    try:
        (x0, y0, x1, y1), caption = box["box_xyxy"], box.get("caption_index", 0)
        if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1 and caption in range(captions)):
            raise ValueError
    except (TypeError, KeyError, ValueError, AttributeError) as error:  # whatever else JSON may hold there
        raise ContentError(
            f"box {number} is not x0, y0, x1, y1 in 0..1 of one of its captions", kind="box"
        ) from error
    return Phrase(text=_clean(box.get("phrase"), f"phrase {number}"), box=(x0, y0, x1, y1), caption=caption)
