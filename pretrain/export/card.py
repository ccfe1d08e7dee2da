"""The model card of an export: how to use it, and what the run knows of itself."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any, Literal

import yaml

from datasets.weights import Weight, turns, weight_at, weights_in
from objectives import kind_of
from pretrain import runfile
from pretrain.config import Run
from pretrain.curriculum import Curriculum, Stretch
from pretrain.evaluate.results import AVERAGED
from pretrain.evaluate.subject import Subject
from pretrain.export.preprocessing import normalisation_of
from pretrain.rundir import RunDir
from pretrain.sinks import jsonl

Library = Literal["open_clip", "transformers"]

USAGE: dict[Library, Template] = {
    "open_clip": Template('''\
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:$folder")
tokenizer = open_clip.get_tokenizer("local-dir:$folder")
model.eval()
image = Image.new("RGB", (320, 240), "red")  # or Image.open("photo.jpg")
texts = ["a red square", "a blue circle"]
with torch.no_grad():
    seen = model.encode_image(preprocess(image).unsqueeze(0), normalize=True)
    read = model.encode_text(tokenizer(texts), normalize=True)
    logits = model.logit_scale.exp() * seen @ read.T
print(dict(zip(texts, logits.softmax(-1)[0].tolist())))'''),
    "transformers": Template('''\
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("$folder").eval()
processor = AutoProcessor.from_pretrained("$folder")
image = Image.new("RGB", (320, 240), "red")  # or Image.open("photo.jpg")
texts = ["a red square", "a blue circle"]
inputs = processor(images=image, text=texts, padding="max_length", truncation=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits_per_image
print(dict(zip(texts, logits.softmax(-1)[0].tolist())))'''),
}  # fmt: skip
"""Code that runs as it stands, beside the directory that it names."""
_PATH = re.compile(r"(?<![^\s,:{`])/(?!/)[^,`]+")
"""An absolute path in a setting or a sentence: at its beginning, or behind what separates or names one."""


def card(subject: Subject, run_dir: Path, *, to: Library, out: Path, notes: Sequence[str]) -> str:
    """README.md of an export.

    Args:
        subject: the model, and how it was trained.
        run_dir: where it was trained.
        to: the library that the export is for.
        out: where the export will be found.
        notes: sentences about its preprocessing.
    """
    from huggingface_hub import ModelCardData

    run = subject.run
    assert run is not None
    begun = _begun(run, subject.step)
    trained_by = [name for name in run.objectives if any(name in _weights(run, each) for each in begun)]
    kinds = sorted({kind_of(run.objectives[name]) for name in trained_by})
    header = ModelCardData(
        library_name=to, pipeline_tag="zero-shot-image-classification", tags=["medley", "clip", *kinds]
    )
    samples = Curriculum(run.stages).samples_at(subject.step)
    name = out.resolve().name
    sections = {
        "Use": [
            f"In the directory that holds `{name}`:",
            f"```python\n{USAGE[to].substitute(folder=name)}\n```",
        ],
        "Data": _data(run, run_dir, subject.step),
        "Training": _training(run, begun, subject, samples),
        "Evaluation": _evaluation(run, run_dir, subject),
        "Preprocessing": [*_preprocessing(subject), *map(_short, notes)],
        "Recipe": ["All settings of the run:", f"```yaml\n{_recipe(run)}```"],
    }
    paragraphs = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name}",
        f"An image-text model, pretrained with Medley {version()} ({' + '.join(trained_by)}) on "
        f"{samples} samples of `{_short(run.data)}`.",
        *(paragraph for title, body in sections.items() for paragraph in (f"## {title}", *body)),
    ]
    return "\n\n".join(paragraphs) + "\n"


def version() -> str:
    """Medley's own, from pyproject.toml: the repository is run, not installed."""
    root = Path(__file__).resolve().parents[2]
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def _data(run: Run, run_dir: Path, step: int) -> list[str]:
    state = RunDir(run_dir).checkpoints / f"step-{step:08d}" / "state.json"
    # A run that trains on may have dropped this checkpoint meanwhile.
    known = json.loads(state.read_bytes())["data"] if state.is_file() else {}
    evaluated = f"`{_short(run.val)}`" if run.val else "scenes of their own" if run.data == "scenes" else ""
    rows = [
        (
            name, f"`{_short(source.data)}`", source.holds, source.captions,
            known[name]["size"] or "drawn without end" if name in known else "unknown",
            f"`{known[name]['fingerprint'] if name in known else 'unknown'}`",
        )
        for name, source in run.sources.items()
    ]  # fmt: skip
    table = _table(("source", "data", "holds", "captions of a sample", "samples", "fingerprint"), rows)
    return [table, *([f"Evaluated on {evaluated}."] if evaluated else [])]


def _begun(run: Run, step: int) -> list[Stretch]:
    """What was trained before a step; the last of it perhaps not to its end."""
    stretches = Curriculum(run.stages).stretches
    return [replace(each, last=min(each.last, step)) for each in stretches if each.first < step]


def _weights(run: Run, stretch: Stretch) -> dict[str, Weight]:
    """The objectives that a stage minimises, with weights on the line of the run's steps."""
    own = {name: config.weight for name, config in run.objectives.items()}
    return weights_in(stretch.stage.objectives, own, begins=stretch.begins)


def _weight(weight: Weight, first: int, last: int) -> str:
    """In a number, or in those where it turns between two steps of the run."""
    inside = {step for step in turns(weight) if first < step < last}
    values = {step: f"{weight_at(weight, step):g}" for step in sorted({first, last, *inside})}
    if len(set(values.values())) == 1:
        return values[first]
    return ", ".join(f"{value} at step {step}" for step, value in values.items())


def _training(run: Run, begun: Sequence[Stretch], subject: Subject, samples: int) -> list[str]:
    stages = [
        (
            each.name, each.last - each.first, each.batch, f"{each.resolution} px",
            each.stage.optim.kind, each.stage.optim.lr, each.stage.optim.weight_decay,
        )
        for each in begun
    ]  # fmt: skip
    ends = {each.name: each.last for each in begun}
    objectives = [
        (each.name, name, kind_of(run.objectives[name]), _weight(weight, each.begins, ends[each.name]))
        for each in begun
        if each.first == each.begins
        for name, weight in _weights(run, each).items()
    ]
    pretrained = _short(getattr(run.model, "pretrained", ""))
    return [
        f"Step {subject.step}: {samples} samples seen, from "
        f"{f'`{pretrained}`' if pretrained else 'random weights'}.",
        *([f"{AVERAGED.capitalize()}."] if subject.averaged else []),
        _table(("stage", "steps", "batch", "images", "optimizer", "peak learning rate", "decay"), stages),
        _table(("stage", "objective", "kind", "weight"), objectives),
    ]


def _evaluation(run: Run, run_dir: Path, subject: Subject) -> list[str]:
    """The last value of each measure up to this step, and what was found on other data."""
    rundir, unreadable = RunDir(run_dir), list[str]()
    rows: dict[tuple[str, str, int], tuple[float, float | None]] = {}
    for name, (value, step) in _last_values(rundir, subject.step).items():
        limit = 0 if (run.val or run.data) == "scenes" else run.eval.limit
        rows[name, _on(run.val or run.data, limit=limit, classes=run.eval.classes), step] = value, None
    # What the run said itself may be in a file as well, with what guessing would get.
    for path in sorted(rundir.evaluations.glob("*.json")):
        try:
            rows |= _found(path, resolution=subject.resolution, averaged=subject.averaged)
        except (OSError, ValueError, TypeError, AttributeError, LookupError):  # no JSON, or of another form
            unreadable.append(f"`{path.name}` of the run's evaluations could not be read and is left out.")
    if not rows:
        return ["Not evaluated.", *unreadable]
    cells = (
        (name, *("" if each is None else f"{each:.4g}" for each in values), on, step)
        for (name, on, step), values in rows.items()
    )
    return [_table(("measure", "value", "chance", "data", "step"), cells), *unreadable]


def _last_values(rundir: RunDir, step: int) -> dict[str, tuple[float, int]]:
    """Of each measure that training took up to a step: its last value, and at which step."""
    last: dict[str, tuple[float, int]] = {}
    for record in jsonl.read(rundir.metrics) if rundir.metrics.exists() else ():
        if record["step"] <= step:
            last |= {
                name.removeprefix("eval/"): (value, record["step"])
                for name, value in record.items()
                if name.startswith("eval/") and value is not None
            }
    return last


def _found(
    path: Path, *, resolution: int, averaged: bool
) -> dict[tuple[str, str, int], tuple[float, float | None]]:
    """(measure, data, step) -> (value, chance) of a file that `pretrain.evaluate` wrote.

    Args:
        path: the file.
        resolution: the side of the images that need not be told.
        averaged: whether the weights are averages, which need not be told either.
    """
    found = json.loads(path.read_bytes())
    side = found.get("resolution") or resolution
    on = _on(
        found["data"],
        limit=found.get("limit", 0),
        classes=found.get("classes", ""),
        resolution=0 if side == resolution else side,
        weights="" if (its := found.get("averaged", False)) == averaged else "averaged" if its else "raw",
    )
    return {
        (name, on, int(found["step"])): (
            float(result["value"]),
            None if result["chance"] is None else float(result["chance"]),
        )
        for name, result in found["values"].items()
    }


def _on(data: str, *, limit: int, classes: str, resolution: int = 0, weights: str = "") -> str:
    """What was evaluated on, with what was set for it."""
    told = [
        f"its first {limit} samples" if limit else "",
        f"classes `{_short(classes)}`" if classes else "",
        f"{resolution} px" if resolution else "",
        f"{weights} weights" if weights else "",
    ]
    return ", ".join([f"`{_short(data)}`", *filter(None, told)])


def _preprocessing(subject: Subject) -> list[str]:
    seen, side, tokenizer = normalisation_of(subject.model.image), subject.resolution, subject.tokenizer
    return [
        f"Images: RGB, the central square, resized to {side} by {side} px (bicubic, antialiased), in 0..1, "
        f"less {seen.mean}, divided by {seen.std}. Libraries resize before they cut out the square, so "
        "theirs may lie half a pixel beside it.",
        f"Captions: at most {tokenizer.context_length} of {tokenizer.vocabulary} tokens; longer ones lose "
        "their last words.",
    ]


def _recipe(run: Run) -> str:
    """The run as YAML text; where its files lay is nobody else's concern."""

    def portable(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: portable(item) for key, item in value.items()}
        if isinstance(value, list):
            return [portable(item) for item in value]
        return _short(value) if isinstance(value, str) else value

    return yaml.safe_dump(portable(runfile.to_plain(run)), sort_keys=False, width=110)


def _short(text: str) -> str:
    """The last two names of each absolute path: the others are those of one machine."""
    return _PATH.sub(lambda path: ".../" + "/".join(path[0].strip("/").split("/")[-2:]), text)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    # A bar inside a cell would begin the next one.
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in row)} |" for row in cells)
