"""A command whose reader has gone ends without a word, and only then; every command is run so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS_ONLY = {"slurm/keeper.py", "pretrain/testing.py"}

FLUSHED = "print('x' * 100_000, flush=True)"
HELD = "print('x')"
HELP = "argparse.ArgumentParser().parse_args(['--help'])"
LOST = "raise BrokenPipeError('a worker')"
CRASH = "print('x'); raise RuntimeError('a crash')"


def ended(*command: str, heard: bool) -> subprocess.CompletedProcess[bytes]:
    """A command whose output somebody reads, or whose reader has gone before it began."""
    reads, writes = os.pipe()
    if not heard:
        os.close(reads)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=buffered, stdout=writes, stderr=subprocess.PIPE, timeout=300
    )
    os.close(writes)
    if heard:
        os.close(reads)
    return done


def calling(body: str) -> tuple[str, str]:
    main = f"def main(_):\n    {body}\n    return 3\n"
    return "-c", f"import argparse\nfrom datasets.commands import run\n{main}run(main)"


@pytest.mark.parametrize("body", [FLUSHED, HELD, HELP])
def test_a_reader_who_has_gone_is_no_error(body):
    done = ended(*calling(body), heard=False)
    assert (done.stderr, done.returncode) == (b"", 141)


@pytest.mark.parametrize(("body", "code"), [(HELD, 3), (HELP, 0), ("raise SystemExit(2)", 2)])
def test_the_exit_code_is_the_commands_own(body, code):
    done = ended(*calling(body), heard=True)
    assert (done.stderr, done.returncode) == (b"", code)


@pytest.mark.parametrize(("body", "heard"), [(LOST, True), (CRASH, True), (CRASH, False)])
def test_a_crash_is_told_whoever_reads(body, heard):
    done = ended(*calling(body), heard=heard)
    assert done.stderr.startswith(b"Traceback")
    assert done.returncode not in (0, 3, 141)


def test_help_of_a_command_that_nobody_reads():
    done = ended("-m", "slurm.status", "--help", heard=False)
    assert (done.stderr, done.returncode) == (b"", 141)


def test_every_command_is_run_so():
    found = {
        str(path.relative_to(ROOT)): path.read_text()
        for package in ("datasets", "objectives", "pretrain", "slurm")
        for path in (ROOT / package).rglob("*.py")
    }
    ends = {name: text.partition('if __name__ == "__main__":')[2] for name, text in found.items()}
    commands = {name for name, end in ends.items() if end} - TESTS_ONLY
    assert len(commands) >= 11
    assert [name for name in sorted(commands) if "run(" not in found[name].splitlines()[-1]] == []
