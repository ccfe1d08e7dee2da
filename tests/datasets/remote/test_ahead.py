from threading import Event, Lock, get_ident
from time import sleep

from datasets.remote.ahead import Ahead


def test_items_are_worked_on_once_by_few_threads():
    done, threads, lock = [], set(), Lock()
    finished = Event()

    def work(item):
        with lock:
            done.append(item)
            threads.add(get_ident())
            if len(set(done)) == 100:
                finished.set()

    ahead = Ahead(work, threads=3, limit=1000)
    for item in range(100):
        ahead.put(item)
    assert finished.wait(120)
    ahead.close(patience=120)
    assert sorted(done) == list(range(100))
    assert len(threads) <= 3
    assert len(ahead) == 0


def test_what_waits_is_not_queued_again_and_what_does_not_fit_is_left_out():
    started, go, done = Event(), Event(), []

    def work(item):
        started.set()
        go.wait(120)
        done.append(item)

    ahead = Ahead(work, threads=1, limit=2)
    ahead.put("worked on")
    assert started.wait(120)
    for item in ("worked on", "a", "a", "b", "c", "b"):
        ahead.put(item)
    assert len(ahead) == 3
    go.set()
    while len(ahead):
        sleep(0.001)
    assert done == ["worked on", "a", "b"]
    ahead.put("a")  # done is not known any more
    while len(ahead):
        sleep(0.001)
    assert done[3:] == ["a"]
    ahead.close(patience=120)


def test_closing_forgets_what_waits():
    started, go, done = Event(), Event(), []

    def work(item):
        started.set()
        go.wait(120)
        done.append(item)

    ahead = Ahead(work, threads=1, limit=10)
    for item in range(5):
        ahead.put(item)
    assert started.wait(120)
    ahead.close(patience=0.1)
    go.set()
    ahead.close(patience=120)
    ahead.put(9)
    assert done == [0]


def test_closing_what_never_started():
    Ahead(print, threads=1, limit=1).close(patience=1)
