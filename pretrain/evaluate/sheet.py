"""RUN_DIR/samples: a few fixed images with what the model says of them, as a picture and as data."""

from __future__ import annotations

import io
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor

from datasets.collate import collate
from datasets.source import Source
from pretrain.evaluate.judge import Judge
from pretrain.fencing import replace

_IMAGES = 16
_COLUMNS = 4
_POOL = 500
"""Captions that a model which writes none chooses from."""
_SHOWN = 120
"""Characters of a caption on the sheet; the data beside it have all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One image and what is said of it."""

    key: str
    image: Tensor
    """(3, H, W) uint8"""
    said: str
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """What a model says of a few fixed images."""

    rows: tuple[Row, ...]
    said_by: Literal["captioner", "nearest caption"]
    """Generated, or the nearest of the data's own captions where the model writes none."""


def make_sheet(judge: Judge, source: Source, *, resolution: int) -> Sheet:
    """Images spread evenly over a source, those that can be read; the same ones each time."""
    size = source.size or _IMAGES
    indices = sorted({place * size // _IMAGES for place in range(_IMAGES)})
    samples = [source.read(i, seed=(0, 0, i), resolution=resolution) for i in indices]
    samples = [sample for sample in samples if not sample.fault]
    batch = collate(samples, judge.tokenizer, resolution=resolution)
    look = judge.look(batch)
    said = look.said or _nearest(judge, source, look.features)
    return Sheet(
        rows=tuple(
            Row(key=sample.key, image=image, said=one, references=sample.captions)
            for sample, image, one in zip(samples, batch.images, said, strict=True)
        ),
        said_by="nearest caption" if look.said is None else "captioner",
    )


def _nearest(judge: Judge, source: Source, features: Tensor) -> tuple[str, ...]:
    """Of each image the nearest of the first captions of the data."""
    indices = range(min(_POOL, source.size or _POOL))
    pool = list(dict.fromkeys(caption for index in indices for caption in source.captions(index)))
    if not pool:
        return ("",) * len(features)
    return tuple(pool[place] for place in (features @ judge.sentences(pool).T).argmax(1).tolist())


def save_sheet(sheet: Sheet, folder: Path, *, step: int, samples: int) -> Path:
    """Write the picture, the images one by one, and what is said as JSON; returns the picture's path.

    Args:
        sheet: what to write.
        folder: RUN_DIR/samples; created.
        step: optimizer steps done.
        samples: images seen in training.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for place, row in enumerate(sheet.rows):
        name = f"images/{place:02d}.png"
        _keep(folder / name, _png(row.image))
        rows.append({"key": row.key, "image": name, "said": row.said, "references": list(row.references)})
    picture = folder / f"step-{step:08d}.png"
    _draw(sheet, picture, step=step)
    record = {
        "step": step,
        "samples": samples,
        "said_by": sheet.said_by,
        "sheet": picture.name,
        "rows": rows,
    }
    # Last, and whole: who follows this directory reads the JSON first.
    replace(folder / f"step-{step:08d}.json", json.dumps(record, indent=1).encode())
    return picture


def _png(image: Tensor) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(encoded, "PNG")
    return encoded.getvalue()


def _keep(path: Path, content: bytes) -> None:
    """Write a file that others may be reading: whole, and only if it says something new."""
    if not path.exists() or path.read_bytes() != content:
        replace(path, content)


def _draw(sheet: Sheet, path: Path, *, step: int) -> None:
    # Imported here: it costs half a second.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = max(1, -(-len(sheet.rows) // _COLUMNS))
    layout = ConstrainedLayoutEngine(h_pad=0.2)
    figure = Figure(figsize=(2.6 * _COLUMNS, 3.5 * rows), dpi=100, layout=layout)
    for place, row in enumerate(sheet.rows, start=1):
        axes = figure.add_subplot(rows, _COLUMNS, place)
        axes.imshow(row.image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        right = row.said in row.references
        reference = row.references[0] if row.references else ""
        axes.set_title(_wrapped(row.said), fontsize=8, color="#1a7f37" if right else "#1f5fa8")
        axes.set_xlabel(_wrapped(reference), fontsize=7, color="#666666", labelpad=3)
        for text in (axes.title, axes.xaxis.label):
            text.set_parse_math(False)  # a caption may hold a dollar sign
    figure.suptitle(
        f"step {step}: above, by the {sheet.said_by} (green: word for word); below, the reference", fontsize=9
    )
    drawn = io.BytesIO()
    figure.savefig(drawn)
    _keep(path, drawn.getvalue())


def _wrapped(text: str) -> str:
    # What is not printable has no glyph, and a font without a script's glyphs draws boxes: both are harmless.
    return "\n".join(textwrap.wrap(textwrap.shorten(text, _SHOWN, placeholder=" ..."), 34)) or " "
