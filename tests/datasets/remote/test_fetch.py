import random
import socket
import ssl
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Event, Timer
from time import monotonic
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.errors import ShardError, UserError
from datasets.health import Meter
from datasets.remote.answer import GoneError
from datasets.remote.fetch import Remote, fetch, fetch_to, read_whole, shown, size_of
from datasets.remote.web import _explained, _seconds
from datasets.testing import BUSY, RESET, STALL, FaultServer, Misstep

CONTENT = random.Random(1).randbytes(300_000)
QUICK = Remote(deadline=120.0, stall=60.0)
SHORT = Remote(deadline=0.8, stall=0.2)
PASSING = {
    "reset": RESET,
    "reset in the body": Misstep(after=70_000, then="reset"),
    "stall": STALL,
    "stall in the body": Misstep(after=70_000, then="stall"),
    "503": BUSY,
    "500": Misstep(status=500),
    "408": Misstep(status=408),
    "429": Misstep(status=429, headers=(("Retry-After", "0"),)),
    "truncated, length known": Misstep(after=70_000),
    "truncated, length unknown": Misstep(after=70_000, length=False),
    "nothing": Misstep(after=0, length=False),
    "wrong range": Misstep(shift=100),
}


def meeting(misstep):
    """A server that is slow is not taken for one that stalls, but where that is what it does."""
    return replace(QUICK, stall=0.3) if misstep.then == "stall" else QUICK


@pytest.fixture
def server(fault_server):
    (fault_server.folder / "a.tar").write_bytes(CONTENT)
    (fault_server.folder / "empty").write_bytes(b"")
    return fault_server


@pytest.mark.parametrize("misstep", PASSING.values(), ids=PASSING)
def test_what_passes_changes_nothing(server, misstep):
    meter = Meter()
    server.script("a.tar", misstep, misstep)
    got = fetch(server.url("a.tar"), 1000, 250_000, remote=meeting(misstep), meter=meter, size=len(CONTENT))
    assert got == CONTENT[1000:250_000]
    taken = meter.take()
    assert taken["retry"] == 2 or (misstep.then == "stall" and taken["retry"] > 2)
    assert taken["fetch_count"] == 1
    assert taken["fetch_bytes"] == 249_000  # what had come is not asked for again
    assert server.requests[-1][2] == 250_000


@settings(deadline=None, max_examples=20)
@given(
    data=st.data(),
    script=st.lists(st.sampled_from([RESET, BUSY, *PASSING.values()]).filter(lambda m: m.then != "stall")),
)
def test_any_range_comes_through_any_weather(tmp_path_factory, data, script):
    begin = data.draw(st.integers(0, len(CONTENT)))
    end = data.draw(st.integers(begin, len(CONTENT)))
    folder = tmp_path_factory.mktemp("served")
    (folder / "a.tar").write_bytes(CONTENT)
    with FaultServer(folder) as server:
        server.script("a.tar", *script[:3])
        assert fetch(server.url("a.tar"), begin, end, remote=QUICK) == CONTENT[begin:end]


@pytest.mark.parametrize("misstep", PASSING.values(), ids=PASSING)
@pytest.mark.usefixtures("no_pauses")
def test_what_does_not_pass_is_given_up_in_time(server, misstep):
    server.always("a.tar", replace(misstep, after=0) if misstep.after else misstep)
    meter, remote = Meter(), replace(meeting(misstep), deadline=25.0)
    with pytest.raises(ShardError, match=r"1:\d+/a.tar could not be read within 25 s: .*--remote.dead"):
        fetch(server.url("a.tar"), 0, 1000, remote=remote, meter=meter)
    assert meter.take()["retry"] == 6


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 418])
def test_a_refusal_is_final(server, status):
    server.always("a.tar", Misstep(status=status))
    with pytest.raises(ShardError, match=rf"a.tar cannot be read: the server said {status} ") as raised:
        fetch(server.url("a.tar"), 0, 10, remote=QUICK)
    assert len(server.requests) == 1
    assert str(raised.value).count(". ") == 0


def test_a_range_that_is_not_there_is_final(server):
    with pytest.raises(ShardError, match=r"the server said 416 .*: it has 300000 bytes"):
        fetch(server.url("a.tar"), 300_000, 300_010, remote=QUICK)
    assert len(server.requests) == 1


def test_another_size_is_final(server):
    with pytest.raises(ShardError, match="it has 300000 bytes, and had 400000 when it was indexed"):
        fetch(server.url("a.tar"), 0, 10, remote=QUICK, size=400_000)
    assert len(server.requests) == 1


def test_an_object_that_is_replaced_between_two_attempts_is_refused(server):
    class Pause(Event):
        def wait(self, timeout=None):
            (server.folder / "a.tar").write_bytes(CONTENT[:-1])
            return super().wait(timeout)

    server.script("a.tar", Misstep(after=100))
    with pytest.raises(ShardError, match="it has 299999 bytes, and had 300000"):
        fetch(server.url("a.tar"), 0, 200_000, remote=QUICK, size=len(CONTENT), stop=Pause())
    assert [begin for _, begin, _ in server.requests] == [0, 100]


@pytest.mark.parametrize("length", [True, False])
def test_a_server_that_knows_no_ranges_is_read_from_its_start(server, length):
    server.always("a.tar", Misstep(ranges=False, length=length))
    assert fetch(server.url("a.tar"), 5000, 9000, remote=QUICK) == CONTENT[5000:9000]
    assert read_whole(server.url("a.tar"), remote=QUICK) == CONTENT


def test_a_long_trickle_ends_at_the_deadline(server, monkeypatch):
    """Bytes keep coming, so that nothing stalls, and still it ends."""
    meter = Meter()
    monkeypatch.setattr("datasets.remote.fetch.monotonic", count(0, 30).__next__)  # 30 s from chunk to chunk
    with pytest.raises(ShardError, match=r"within 120 s: it comes too slowly"):
        fetch(server.url("a.tar"), 0, 300_000, remote=QUICK, meter=meter)
    taken = meter.take()
    assert 0 < taken["fetch_bytes"] < 300_000
    assert "retry" not in taken


def test_a_server_that_asks_to_wait_too_long_is_not_waited_for(server):
    server.always("a.tar", Misstep(status=503, headers=(("Retry-After", "3600"),)))
    with pytest.raises(ShardError, match="503 Service Unavailable"):
        fetch(server.url("a.tar"), 0, 10, remote=QUICK)
    assert len(server.requests) == 1


def test_a_server_is_given_the_time_it_asks_for(server):
    server.script("a.tar", Misstep(status=429, headers=(("Retry-After", "1"),)))
    start = monotonic()
    assert fetch(server.url("a.tar"), 0, 10, remote=QUICK) == CONTENT[:10]
    assert monotonic() - start >= 1


def test_a_date_is_understood_too():
    assert _seconds("Fri, 31 Dec 1999 23:59:59 GMT") == 0
    assert _seconds("Fri, 31 Dec 2399 23:59:59 GMT") > 1e9
    assert _seconds("soon") == _seconds("") == 0


def test_redirects_are_followed_but_not_for_ever(server):
    server.script("b.tar", Misstep(status=302, headers=(("Location", server.url("a.tar")),)))
    assert fetch(server.url("b.tar"), 7, 20, remote=QUICK) == CONTENT[7:20]
    server.always("b.tar", Misstep(status=302, headers=(("Location", server.url("b.tar")),)))
    with pytest.raises(ShardError, match="redirects"):
        fetch(server.url("b.tar"), 7, 20, remote=QUICK)


def test_nobody_listening_is_given_up(server):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and nobody else can
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.tar"
        with pytest.raises(ShardError, match="Connection refused"):
            fetch(url, 0, 10, remote=SHORT)


def test_an_unknown_host_is_given_up_early(monkeypatch):
    asked = []

    def unknown(*arguments, **named):
        asked.append(arguments)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("datasets.remote.fetch._FIRST_PAUSE", 0.001)
    with pytest.raises(ShardError, match="its host is unknown"):
        fetch("http://no.such.host/a.tar", 0, 10, remote=Remote(deadline=1000))
    assert len(asked) == 6


def test_a_certificate_that_is_not_accepted_is_final():
    """As httpx wraps it: the reason lies two exceptions below."""
    cause = ssl.SSLCertVerificationError()
    cause.verify_message = "self-signed certificate"
    error, between = httpx.ConnectError("no"), OSError()
    error.__cause__, between.__context__ = between, cause
    assert str(_explained(error)) == "its certificate is not accepted (self-signed certificate)"
    assert isinstance(_explained(error), GoneError)


def test_names_with_spaces_and_other_scripts(server):
    for name in ("a b.tar", "日本.tar", "100%.tar"):
        (server.folder / quote(name)).write_bytes(CONTENT)
        assert fetch(server.url(quote(name)), 3, 9, remote=QUICK) == CONTENT[3:9]


def test_a_connection_is_kept(server):
    for begin in range(0, 200_000, 20_000):
        fetch(server.url("a.tar"), begin, begin + 90_000, remote=QUICK)
    assert server.connections == 1


def test_whole_objects(server, tmp_path):
    url = server.url("a.tar")
    assert size_of(url, remote=QUICK) == len(CONTENT)
    assert size_of(server.url("empty"), remote=QUICK) == 0
    assert read_whole(url, remote=QUICK) == CONTENT
    assert read_whole(server.url("empty"), remote=QUICK) == b""
    server.script("a.tar", BUSY, Misstep(), Misstep(after=70_000, then="reset"), Misstep(after=9000))
    assert fetch_to(url, tmp_path / "copy", remote=QUICK) == len(CONTENT)
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert [begin for _, begin, _ in server.requests[-2:]] == [70_000, 79_000]


def test_a_long_object_has_a_deadline_for_each_piece(server, tmp_path, monkeypatch):
    """It takes longer than the deadline in all, and comes."""
    monkeypatch.setattr("datasets.remote.fetch.PIECE", 20_000)
    now = count(0, 30)  # 30 s from chunk to chunk, of which there are five or more
    monkeypatch.setattr("datasets.remote.fetch.monotonic", now.__next__)
    assert fetch_to(server.url("a.tar"), tmp_path / "copy", remote=QUICK) == len(CONTENT)
    assert next(now) > 2 * QUICK.deadline - 30


def test_a_size_that_is_not_said(server):
    server.always("a.tar", Misstep(ranges=False, length=False))
    with pytest.raises(ShardError, match="does not say how large it is"):
        size_of(server.url("a.tar"), remote=QUICK)


def test_stopping_ends_a_wait(server):
    server.always("a.tar", BUSY)
    stop = Event()
    Timer(0.2, stop.set).start()
    with pytest.raises(ShardError, match="reading was stopped"):
        fetch(server.url("a.tar"), 0, 10, remote=Remote(deadline=1000), stop=stop)


def test_what_no_library_reads_is_refused():
    for url in ("ftp://host/a.tar", "pipe://cat", "file:///etc/passwd", "hdfs://a/b"):
        with pytest.raises(UserError, match="give gs, http, https, s3 or a local path"):
            fetch(url, 0, 10, remote=QUICK)


@pytest.mark.parametrize("url", ["http://me:pass@h:abc/x.tar?secret", "http://[::1/x.tar", "s3://[b/x.tar"])
def test_a_malformed_url_is_said(url):
    for ask in (read_whole, size_of):
        with pytest.raises(UserError, match=r"x\.tar is not written as URLs are .*: mend it") as raised:
            ask(url, remote=QUICK)
        assert "pass" not in str(raised.value)
        assert "secret" not in str(raised.value)


def test_messages_show_no_secret():
    assert shown("https://me:secret@host:81/a/b.tar?X-Signature=abc#x") == "https://host:81/a/b.tar"
    with pytest.raises(ShardError) as raised:
        fetch("http://me:secret@127.0.0.1:9/a.tar?signature=abc", 0, 10, remote=SHORT)
    assert "secret" not in str(raised.value)
    assert "signature" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": 0.1}, r"--remote\.cache 0\.1 .* 0\.25 or more"),
        ({"cache": float("nan")}, r"--remote\.cache nan"),
        ({"cache": float("inf")}, r"--remote\.cache inf"),
        ({"stall": 0.0}, r"--remote\.stall 0 .* above 0"),
        ({"stall": float("inf")}, r"--remote\.stall inf"),
        ({"deadline": float("inf")}, r"--remote\.deadline inf"),
        ({"deadline": float("nan")}, r"--remote\.deadline nan"),
        ({"connections": 0}, r"--remote\.connections 0"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(UserError, match=message):
        Remote(**settings).check()


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert Remote().place() == Path("/x/medley/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Remote().place() == Path.home() / ".cache/medley/shards"
    assert Remote(folder="/fast").place() == Path("/fast")
    with pytest.raises(UserError, match="~nobody-here/x begins with a home folder that is not known"):
        Remote(folder="~nobody-here/x").place()
