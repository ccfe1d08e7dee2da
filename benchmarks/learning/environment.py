"""The environment that open_clip_train runs in: its released package with the webdataset that it pins.

It is a virtual environment of its own, because Medley wants a newer webdataset than open_clip's training
extra allows. It has Medley's version of torch, so that both run the same kernels.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from datasets.errors import UserError

RELEASE = "3.3.0"
_PACKAGES = ("open_clip_torch", "torch", "webdataset", "timm", "pillow")
_VERSIONS = f"""
import json
from importlib.metadata import PackageNotFoundError, version
def of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
print(json.dumps({{name: of(name) for name in {_PACKAGES!r}}}))
"""


def peer_python(folder: Path) -> Path:
    """The interpreter of the environment in `folder`, which is made or completed where need be.

    Raises:
        UserError: the folder holds something else, or the packages could not be installed.
    """
    python = folder / "bin" / "python"
    torch = version("torch").partition("+")[0]
    if _fits(python, torch):
        return python
    if not python.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--environment {folder} is not empty and no virtual environment: name another")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    print(f"installing open_clip_torch[training]=={RELEASE} in {folder}", flush=True)
    wanted = [f"open_clip_torch[training]=={RELEASE}", f"torch=={torch}"]
    done = subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], check=False)
    if done.returncode or not _fits(python, torch):
        raise UserError(f"pip could not install {' '.join(wanted)} in {folder}: see its messages above")
    return python


def versions(python: Path) -> dict[str, str | None]:
    """What is installed in the environment of an interpreter, of the packages that matter here."""
    found = subprocess.run([str(python), "-I", "-c", _VERSIONS], check=True, capture_output=True, text=True)
    return json.loads(found.stdout)


def _fits(python: Path, torch: str) -> bool:
    if not python.exists():
        return False
    found = versions(python)
    complete = all(found.values()) and found["open_clip_torch"] == RELEASE
    return complete and str(found["torch"]).partition("+")[0] == torch
