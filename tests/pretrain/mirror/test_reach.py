import socket
import threading

from pretrain.mirror import reach


def test_who_answers_and_who_does_not(server):
    assert reach.answers(server.url, seconds=60)
    assert reach.answers(f"{server.url}/nothing", seconds=60)
    assert not reach.answers("http://127.0.0.1:9", seconds=60)
    server.down = True
    assert not reach.answers(server.url, seconds=60)


def test_a_server_that_takes_a_call_and_says_nothing_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not reach.answers(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.1)


def test_a_name_that_is_looked_up_for_ever_is_not_waited_for(monkeypatch):
    over = threading.Event()

    def look_up(*_, **__):
        over.wait()
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert not reach.answers("http://nowhere.invalid", seconds=0.1)
    over.set()
