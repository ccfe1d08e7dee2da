"""W&B for training: a process of its own reads the run directory, and training never waits for it.

The process is `python -m pretrain.mirror RUN_DIR --follow`. It ends when its standard input does: when the
run is closed, and also when training is killed. What it says on standard output is said to the user.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import yaml

from datasets.errors import UserError
from pretrain.preempt import sheltered
from pretrain.rundir import RunDir

PATIENCE = 30.0
"""Seconds that the end of a run waits for the last uploads, where there is a server that takes them."""
_HURRIED = 3.0
"""The same, where a scheduler is about to end the process."""
_LAST_MOMENT = 1.0
"""Seconds that a mirror has to end when it has said all that it will say."""
Mode = Literal["auto", "online", "offline", "disabled"]
_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""What WANDB_MODE may say."""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """The run's copy in W&B. A flag wins over W&B's environment variable, which wins over the default."""

    mode: Mode = "auto"
    """auto: WANDB_MODE, else online where there is an API key, else offline."""
    project: str = ""
    """Project; empty: WANDB_PROJECT, else medley."""
    entity: str = ""
    """User or team; empty: WANDB_ENTITY, else the account's own."""
    name: str = ""
    """Name of the run; empty: WANDB_NAME, else that of the run directory."""

    def wanted(self) -> Mode:
        """The mode, with the environment asked where the flag leaves it open.

        Raises:
            UserError: WANDB_MODE is not a mode.
        """
        said = os.environ.get("WANDB_MODE", "")
        if self.mode != "auto" or not said:
            return self.mode
        if said not in _MODES:
            raise UserError(f"WANDB_MODE is {said!r}: set it to online, offline or disabled, or unset it")
        return _MODES[said]


def settings_of(rundir: RunDir) -> Wandb:
    """The settings in a run directory.

    Raises:
        UserError: it is none.
    """
    try:
        return Wandb(**yaml.safe_load(rundir.run_yaml.read_text()).get("wandb", {}))
    except (OSError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise UserError(f"{rundir.root} holds no run.yaml of a run: name the directory of one") from error


class Mirrored:
    """The sink that starts the mirror and ends it; the mirror reads the records from the run directory."""

    def __init__(
        self, rundir: RunDir, *, say: Callable[[str], None], hurried: Callable[[], bool] = lambda: False
    ) -> None:
        """Start the mirror; its first words come later, with some report.

        Args:
            rundir: a directory whose run.yaml and metrics.jsonl are those of this start.
            say: takes each sentence of the mirror.
            hurried: whether the end must not wait for uploads; the next start sends them.
        """
        self._say, self._hurried = say, hurried
        self._log = rundir.wandb / "mirror.log"
        self._begun = b""
        self._failure_told = False
        try:
            rundir.wandb.mkdir(exist_ok=True)
            with self._log.open("ab") as log, sheltered():
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "pretrain.mirror", str(rundir.root), "--follow"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the training
                )
        except OSError as error:
            self._process = None
            say(f"W&B: not mirrored ({error}); training goes on")
            return
        assert self._process.stdout is not None
        self._words = self._process.stdout.fileno()
        os.set_blocking(self._words, False)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Pass on what the mirror has said meanwhile."""
        self._relay()

    def note(self, text: str) -> None:
        """Nothing: sentences are for people."""

    def close(self) -> None:
        """Let the mirror send the rest: done when it is, or when waiting longer is pointless."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        end = time.monotonic() + (_HURRIED if self._hurried() else PATIENCE)
        while self._relay():
            left = end - time.monotonic()
            if left <= 0:
                self._say(f"W&B: still uploading, in the background; see {self._log}")
                return
            select.select([self._words], [], [], left)
        with suppress(subprocess.TimeoutExpired):  # it goes on in the background
            # The pipe ends a moment before the process does, and it is the process that tells of a failure.
            self._tell_failure(self._process.wait(timeout=_LAST_MOMENT))

    def _relay(self) -> bool:
        """Pass on whole lines; False when the mirror will say nothing more."""
        if self._process is None:
            return False
        while True:
            try:
                said = os.read(self._words, 1 << 16)
            except BlockingIOError:
                return True
            if not said:
                self._tell_failure(self._process.poll())
                return False
            *lines, self._begun = (self._begun + said).split(b"\n")
            for line in lines:
                self._say(line.decode())

    def _tell_failure(self, code: int | None) -> None:
        if code and not self._failure_told:
            self._failure_told = True
            self._say(f"W&B: the mirror ended with code {code}, see {self._log}; training goes on")
