"""The exceptions with a meaning of their own; any other is a defect of the program or of the machine."""

from __future__ import annotations

from typing import Final, Literal

Kind = Literal[
    "member", "missing", "checksum",
    "empty_image", "format", "too_large", "truncated", "corrupt",
    "utf8", "json", "no_caption", "not_text", "class", "box", "no_phrase",
]  # fmt: skip
"""What can be wrong with a sample: what is counted together."""

KINDS: Final[dict[str, str]] = {
    "member": "what its shard lists for it cannot be used: a part twice, a link, an absurd size",
    "missing": "a part that is asked of it is not there",
    "checksum": "its bytes are not those that were indexed",
    "empty_image": "its image has no bytes",
    "format": "its image is not a JPEG, PNG or WebP file",
    "too_large": "its image has more pixels than are decoded",
    "truncated": "its image ends too early",
    "corrupt": "a decoder refuses its image",
    "utf8": "its text is not UTF-8, or holds half a surrogate pair",
    "json": "its record is not a JSON object",
    "no_caption": "it has no caption, or an empty one",
    "not_text": "its caption is a number, a list or an object",
    "class": "its class is not a number from 0 on, nor a name",
    "box": "a box of it is not x0, y0, x1, y1 in 0..1 of one of its captions",
    "no_phrase": "it has no phrase with a box",
}
"""Every kind in words."""


class UserError(ValueError):
    """Bad input. Its message is one sentence that names the thing and the way out; exit code 2."""


class ShardError(UserError):
    """A shard that cannot be read, for good: it is gone, forbidden, or not what was indexed. It is named."""


class ContentError(ValueError):
    """A sample is not what it should be. It becomes `Sample.fault` and the slot is masked."""

    def __init__(self, message: str, *, kind: Kind) -> None:
        super().__init__(message)
        self.kind: Kind = kind
