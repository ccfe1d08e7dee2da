"""The parent of a Slurm on one machine: ends all of it when its standard input does.

    python -m slurm.keeper FOLDER m1 m2

Says `ready` when munge, the controller and a daemon for each node are started with FOLDER/slurm.conf, and
again for each further node that a line of its input names. FOLDER goes with it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def program(name: str) -> str | None:
    """Where a daemon or command of Slurm lies, if it is installed."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Keeper:
    """Starts the daemons, and the parent of whatever they leave."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        become_parent = 36  # PR_SET_CHILD_SUBREAPER: orphans among our descendants become our children
        ctypes.CDLL(None, use_errno=True).prctl(become_parent, 1, 0, 0, 0)
        signal.signal(signal.SIGCHLD, self._reap)

    def run(self, nodes: Sequence[str]) -> None:
        """Start everything, then nodes that are asked for, until nobody asks any more."""
        try:
            self._munge()
            self._start("slurmctld", "-D", "-c", log="slurmctld.said")
            for node in nodes:
                self._start("slurmd", "-D", "-N", node, log=f"{node}.said")
            self._say("ready")
            for line in sys.stdin:
                self._start("slurmd", "-D", "-N", line.strip(), log=f"{line.strip()}.said")
                self._say("ready")
        finally:
            self._end()

    def _munge(self) -> None:
        at = {name: f"--{name}-file={self._folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
        socket_path = self._folder / "munge.socket"
        self._start(
            "munged", "--foreground", "--force", f"--socket={socket_path}", *at.values(), log="munged.said"
        )
        until = time.monotonic() + 120
        while not socket_path.exists():
            if time.monotonic() > until:
                self._say(f"munged does not start: {(self._folder / 'munged.said').read_text()[-300:]!r}")
                sys.exit(1)
            time.sleep(0.02)

    def _start(self, name: str, *arguments: str, log: str) -> None:
        path = program(name)
        assert path is not None
        with (self._folder / log).open("ab") as said:
            subprocess.Popen(
                [path, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def _end(self) -> None:
        """Kill our children until there are none: those of a killed one become ours."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        waiting = True
        while waiting:
            for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                waiting = False
        shutil.rmtree(self._folder, ignore_errors=True)

    def _reap(self, *_: object) -> None:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _say(self, line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    Keeper(Path(sys.argv[1])).run(sys.argv[2:])
