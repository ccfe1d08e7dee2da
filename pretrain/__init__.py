"""Pretraining: joins what `datasets` reads and what `objectives` minimises. Run from the repository root.

`datasets` is a name that another package claims too. If it resolves anywhere else than here, every later
error would be a riddle, so the first import says it.
"""

from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_spec = find_spec("datasets")
if _spec is None or _spec.origin is None or Path(_spec.origin).resolve().parent != _ROOT / "datasets":
    found = "nothing" if _spec is None else _spec.origin
    raise ImportError(f"`datasets` resolves to {found}; run from the repository root: cd {_ROOT}")
