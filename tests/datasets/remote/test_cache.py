import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fcntl import LOCK_EX, flock
from pathlib import Path
from threading import Event, Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.errors import UserError
from datasets.remote.cache import Cache, name_of

ROOT = Path(__file__).resolve().parents[3]
NAME, OTHER = name_of("a"), name_of("b")


def on_disk(folder):
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "bytes")


def names(folder):
    return {path.name for path in folder.iterdir()} - {"bytes"}


def bring(cache, name, content):
    return cache.bring(name, lambda: content, whole=len(content), patience=60)


def never():
    raise AssertionError("it is here already")


def test_what_was_brought_is_read(tmp_path):
    cache = Cache(tmp_path / "deep" / "cache", limit=1000)
    assert cache.read(NAME, 0, 3, whole=10) is None
    assert bring(cache, NAME, b"0123456789") == b"0123456789"
    assert cache.read(NAME, 2, 3, whole=10) == b"234"
    assert cache.read(NAME) == b"0123456789"
    assert cache.bring(NAME, never, whole=10, patience=5) is None
    assert names(cache.folder) == {NAME}
    cache.drop(NAME)
    cache.drop(NAME)
    assert cache.read(NAME) is None


@settings(deadline=None, max_examples=30)
@given(
    limit=st.integers(130, 300),
    asked=st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=60),
)
def test_it_is_never_larger_than_its_bound(tmp_path_factory, limit, asked):
    folder = tmp_path_factory.mktemp("cache")
    cache = Cache(folder, limit=limit)
    for number, dropped in asked:
        content = bytes([number]) * (10 + number * 10)
        if dropped:
            cache.drop(name_of(number))
            continue
        brought = bring(cache, name_of(number), content)
        assert brought in (content, None)
        assert cache.read(name_of(number), whole=len(content)) == content
        assert on_disk(folder) <= limit
    assert not [name for name in names(folder) if name.endswith(".part")]


def test_what_was_used_longest_ago_goes_first(tmp_path):
    cache = Cache(tmp_path, limit=100)
    for number in range(4):
        bring(cache, name_of(number), b"x" * 25)
        os.utime(tmp_path / name_of(number), ns=(number, number))
    assert cache.read(name_of(0)) is not None
    assert cache.holds(name_of(1), 25)
    bring(cache, name_of(4), b"x" * 25)
    assert names(tmp_path) == {name_of(0), name_of(1), name_of(4)}  # room for a tenth more is made at once


def test_a_file_larger_than_the_bound_is_only_passed_on(tmp_path):
    cache = Cache(tmp_path, limit=100)
    bring(cache, NAME, b"x" * 60)
    assert bring(cache, OTHER, b"y" * 101) == b"y" * 101
    assert names(tmp_path) == {NAME}


def test_files_that_are_not_ours_are_neither_counted_nor_deleted(tmp_path):
    (tmp_path / "thesis.txt").write_bytes(b"x" * 5000)
    (tmp_path / "folder").mkdir()
    cache = Cache(tmp_path, limit=100)
    for number in range(20):
        assert bring(cache, name_of(number), b"x" * 30) is not None
    assert (tmp_path / "thesis.txt").stat().st_size == 5000
    assert len(names(tmp_path)) <= 3 + 2


def test_what_others_deleted_makes_room(tmp_path):
    cache = Cache(tmp_path, limit=100)
    for number in range(3):
        bring(cache, name_of(number), b"x" * 30)
    for number in (1, 2):
        (tmp_path / name_of(number)).unlink()
    bring(cache, name_of(3), b"x" * 30)
    assert names(tmp_path) == {name_of(0), name_of(3)}


def test_one_of_many_threads_brings_it(tmp_path):
    cache, fetched = Cache(tmp_path, limit=1000), []

    def fetch():
        fetched.append(1)
        Event().wait(0.2)
        return b"whole"

    with ThreadPoolExecutor(8) as pool:
        brought = list(pool.map(lambda _: cache.bring(NAME, fetch, whole=5, patience=60), range(8)))
    assert len(fetched) == 1
    assert sorted(map(str, brought)) == ["None"] * 7 + ["b'whole'"]


def test_who_fails_lets_the_next_one_try(tmp_path):
    cache, started = Cache(tmp_path, limit=1000), Event()

    def fail():
        started.set()
        Event().wait(0.2)
        raise UserError("no")

    def first():
        with pytest.raises(UserError, match="no"):
            cache.bring(NAME, fail, whole=5, patience=60)

    thread = Thread(target=first)
    thread.start()
    started.wait()
    assert bring(cache, NAME, b"whole") == b"whole"
    thread.join()
    assert names(tmp_path) == {NAME}


HOLD = """
import sys, time
from pathlib import Path
from datasets.remote.cache import Cache, name_of
def hang():
    print("fetching", flush=True)
    time.sleep(600)
Cache(Path(sys.argv[1]), limit=1000).bring(name_of("a"), hang, whole=5, patience=600)
"""


@pytest.fixture
def hanging(tmp_path):
    """Another process that fetches for ever."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_a_process_that_was_killed_holds_nobody_up(tmp_path, hanging):
    part = tmp_path / f"{NAME}.part"
    part.write_bytes(b"trash of some length")
    hanging.send_signal(signal.SIGKILL)
    hanging.wait()
    cache = Cache(tmp_path, limit=1000)
    assert cache.read(NAME, whole=5) is None
    assert bring(cache, NAME, b"whole") == b"whole"
    assert cache.read(NAME, whole=5) == b"whole"
    assert names(tmp_path) == {NAME}


def test_a_process_that_hangs_is_not_waited_for(tmp_path, hanging):
    cache = Cache(tmp_path, limit=1000)
    assert cache.bring(NAME, lambda: b"whole", whole=5, patience=0.1) == b"whole"
    assert cache.bring(NAME, never, whole=5, patience=0.1) is None
    assert hanging.poll() is None


def test_what_the_dead_left_makes_room(tmp_path, hanging):
    """And what the living write does not."""
    assert hanging.poll() is None
    (tmp_path / f"{OTHER}.part").write_bytes(b"x" * 80)
    os.truncate(tmp_path / f"{NAME}.part", 50)
    cache = Cache(tmp_path, limit=100)
    assert bring(cache, name_of("c"), b"x" * 30) is not None
    assert names(tmp_path) == {f"{NAME}.part", name_of("c")}


def test_a_short_file_is_not_trusted(tmp_path):
    cache = Cache(tmp_path, limit=1000)
    bring(cache, NAME, b"whole")
    os.truncate(tmp_path / NAME, 3)
    assert cache.read(NAME, 0, 2, whole=5) is None
    assert bring(cache, NAME, b"whole") == b"whole"
    assert cache.read(NAME, 0, 2, whole=5) == b"wh"


def test_a_ledger_that_holds_nonsense_is_counted_anew(tmp_path):
    cache = Cache(tmp_path, limit=100)
    bring(cache, NAME, b"x" * 60)
    (tmp_path / "bytes").write_bytes(b"\xff\x00")
    bring(cache, OTHER, b"x" * 60)
    assert names(tmp_path) == {OTHER}


def test_a_ledger_that_stays_locked_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.remote.cache._LEDGER_PATIENCE", 0.1)
    cache = Cache(tmp_path, limit=100)
    with (tmp_path / "bytes").open("r+b") as held:
        flock(held, LOCK_EX)
        assert bring(cache, NAME, b"whole") == b"whole"
    assert cache.read(NAME) == b"whole"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"the cache .*file/cache cannot be written \(Not a directory\): give"
    ):
        Cache(tmp_path / "file" / "cache", limit=100)


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    cache = Cache(tmp_path, limit=100)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"No space left on device\): give a folder .* --remote.cache"):
        bring(cache, NAME, b"whole")
    assert names(tmp_path) == set()


def no_locks(descriptor, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_where_there_are_no_locks_it_works_without(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.locks.flock", no_locks)
    cache = Cache(tmp_path, limit=100)
    with ThreadPoolExecutor(4) as pool:
        brought = list(pool.map(lambda _: bring(cache, NAME, b"x" * 30), range(8)))
    assert set(brought) <= {b"x" * 30, None}
    assert cache.read(NAME, whole=30) == b"x" * 30
    for number in range(8):
        assert bring(cache, name_of(number), b"y" * 30) == b"y" * 30
        assert on_disk(tmp_path) <= 100
    assert not [name for name in names(tmp_path) if name.endswith(".part")]


def test_what_cannot_be_read_is_not_here(tmp_path, monkeypatch):
    cache = Cache(tmp_path, limit=100)
    bring(cache, NAME, b"0123456789")

    def fails(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for call in ("pread", "open", "stat"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fails)
            patched.setattr(Path, "stat", fails)
            if call != "stat":
                assert cache.read(NAME) is None
            assert not cache.holds(NAME, 10)
    assert cache.read(NAME) == b"0123456789"
