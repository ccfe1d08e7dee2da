"""Medley's own data: pixels, text and their order. Not Hugging Face's package of the same name.

The folder is called `datasets` by choice, and the repository runs from its root, so here the name is
ours. Nothing is imported at this level: a library that finds this package while looking for Hugging
Face's gets a cheap import and an explanation instead of a riddle.
"""

_THEIRS = frozenset({"Dataset", "DatasetDict", "IterableDataset", "load_dataset", "load_from_disk"})


def __getattr__(name: str) -> object:
    """Explain whose package this is when a name of Hugging Face's is asked for."""
    if name in _THEIRS:
        raise AttributeError(
            f"datasets.{name}: this is Medley's package `datasets` ({__file__}), not Hugging Face's; "
            "run tools that need theirs from another directory"
        )
    raise AttributeError(f"module 'datasets' has no attribute {name!r}")
