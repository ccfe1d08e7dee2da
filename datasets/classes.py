"""Names of classes and the sentences they are put into, from a text file or open_clip's own for ImageNet."""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (open_clip is untyped)

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from datasets.errors import UserError
from datasets.homes import at_home


@dataclass(frozen=True)
class Classes:
    """The classes images are sorted into, and how they are put into words."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    """Sentences with `{}` where the name goes."""
    source: str = "the class list"
    """Where they come from, for messages."""

    @cached_property
    def normalised(self) -> frozenset[str]:
        """The names, as they are compared."""
        return frozenset(map(normalise_name, self.names))

    def prompts(self) -> list[list[str]]:
        """Of each class, each template with its name put in."""
        return [[template.replace("{}", name) for template in self.templates] for name in self.names]


def load_classes(spec: str) -> Classes:
    """The classes that `spec` names.

    Args:
        spec: `imagenet` for the names and templates that open_clip bundles, or a UTF-8 text file with one
            class name a line, in the order of the labels. A line with `{}` is a template; a file without
            one gets the 80 of CLIP. Blank lines and lines that begin with `#` are skipped.

    Raises:
        UserError: there is no such file, it is no text, it names no class, or one twice.
    """
    if spec == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return Classes(tuple(IMAGENET_CLASSNAMES), default_templates(), source=spec)
    lines = [line.strip() for line in _read(spec).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    names = tuple(line for line in lines if "{}" not in line)
    templates = tuple(line for line in lines if "{}" in line)
    if not names:
        raise UserError(f"{spec} holds no class names: write one a line")
    twice = [name for name, count in Counter(map(normalise_name, names)).items() if count > 1]
    if twice:
        raise UserError(f"{spec} names the class {twice[0]!r:.80} twice: keep one of the lines")
    return Classes(names, templates or default_templates(), source=spec)


def default_templates() -> tuple[str, ...]:
    """The 80 that CLIP describes ImageNet with."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES  # importing it takes seconds

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def _read(path: str) -> str:
    try:
        text = at_home(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(
            f"there is no class file {path}: give a text file with one class name a line, or `imagenet`"
        ) from error
    except OSError as error:
        raise UserError(f"the class file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the class file {path} is not UTF-8 text: write one class name a line") from error
    if "\0" in text:
        raise UserError(f"the class file {path} is not text: write one class name a line")
    return text


def normalise_name(name: str) -> str:
    """The form in which names are compared: lower case, and spaces, `_` and `-` are all one space."""
    return re.sub(r"[\s_-]+", " ", name.strip().lower())
