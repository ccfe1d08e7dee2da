"""Write the report of one run, or of several side by side: `python -m pretrain.report RUN_DIR [RUN_DIR ...]`.

Exit codes: 0 done, 2 the user can mend it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets.commands import run
from datasets.errors import UserError
from pretrain.report.page import write_report
from pretrain.rundir import RunDir

_DESCRIPTION = "Write one self-contained HTML page about a run, or about several side by side."
DONE, USER_ERROR = 0, 2


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.report", description=_DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="directory of a run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html of the first run")
    options = parser.parse_args(arguments)
    try:
        written = write_report(options.runs, options.out or RunDir(options.runs[0]).report)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    sys.stdout.write(f"{written}\n")
    return DONE


if __name__ == "__main__":
    run(main)
