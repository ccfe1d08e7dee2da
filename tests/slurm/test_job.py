"""Commands that follow each other in one job of submitit."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOB = """
import sys
from slurm.job import Job
first, then, file = sys.argv[1:]
Job(((sys.executable, "-c", first, file), (sys.executable, "-c", then, file)))()
"""
THEN = "import sys; open(sys.argv[1], 'a').write('then')"
NOTE = "import os, sys; open(sys.argv[1], 'w').write('first ')"


@pytest.mark.parametrize(
    ("first", "code", "noted"),
    [
        (NOTE, 0, "first then"),
        (f"{NOTE}; sys.exit(1)", 0, "first then"),
        (f"{NOTE}; sys.exit(75)", 75, "first "),
        (f"{NOTE}; import signal; os.kill(os.getppid(), signal.SIGTERM)", 75, "first "),
    ],
)
def test_what_follows_is_started_unless_the_job_was_interrupted(tmp_path, first, code, noted):
    """Also by a signal that the first command does not answer with an interruption of its own."""
    file = tmp_path / "noted"
    ended = subprocess.run([sys.executable, "-c", JOB, first, THEN, str(file)], cwd=ROOT)
    assert (ended.returncode, file.read_text()) == (code, noted)
