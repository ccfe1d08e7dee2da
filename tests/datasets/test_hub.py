"""The hub, as a server on this machine that counts how often it is asked."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from datasets import hub
from datasets.errors import UserError

COMMIT = "0123456789012345678901234567890123456789"
INSTEAD = "name a local file: --model.pretrained PATH"


class Hub(ThreadingHTTPServer):
    """Answers as the hub does for the files it holds."""

    def __init__(self, files: dict[str, bytes], *, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.status = files, status
        self.asked: list[str] = []
        self.silent = threading.Event()
        self.awaited = threading.Event()
        """Until it is set there are no answers."""
        self.awaited.set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        server: Any = self.server
        server.asked.append(f"{self.command} {self.path}")
        if self.path.startswith("/silent/"):
            server.silent.wait(120)
        server.awaited.wait(120)
        path = self.path.partition("?")[0].removeprefix(f"/ours/tiny/resolve/{COMMIT}/")
        content = server.files.get(path.removeprefix("/ours/tiny/resolve/main/"))
        if server.status != 200 or content is None:
            self.send_response(server.status if server.status != 200 else 404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hash(content) & 0xFFFFFFFF:x}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        pass


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Start a hub, which everything asks from then on; its cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "_PATIENCE", 60.0)  # this machine may be slow, and the hub is one of its threads
    monkeypatch.setattr(hub, "_ANSWER", 120.0)
    running = []

    def begin(files: dict[str, bytes] | None = None, **options: Any) -> Hub:
        server = Hub(files or {}, **options)
        running.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return server

    yield begin
    for server in running:
        server.silent.set()
        server.awaited.set()
        server.shutdown()
        server.server_close()


def refused(repository="ours/tiny", file="open_clip_config.json") -> str:
    with pytest.raises(UserError) as raised:
        hub.fetch(repository, file, instead=INSTEAD)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_file_is_fetched_once_and_then_taken_from_the_cache(serve, monkeypatch):
    server = serve({"open_clip_config.json": b"{}"})
    for name in ("hf-hub:ours/tiny", "ours/tiny"):
        assert hub.fetch(name, "open_clip_config.json", instead=INSTEAD).read_text() == "{}"
    assert server.asked[0] == "HEAD /ours/tiny/resolve/main/open_clip_config.json"
    assert server.asked.count("GET /ours/tiny/resolve/main/open_clip_config.json") == 1, server.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch("ours/tiny", "open_clip_config.json", instead=INSTEAD).is_file()


def test_a_file_that_is_not_there_is_named(serve):
    serve({"open_clip_config.json": b"{}"})
    message = refused(file="open_clip_model.safetensors")
    assert message.startswith("ours/tiny on the hub gives no open_clip_model.safetensors (")
    assert message.endswith(INSTEAD)


def test_a_hub_that_cannot_answer_is_asked_once(serve):
    server = serve(status=503)
    message = refused()
    assert "which cannot be reached (status 503)" in message
    assert "hf download ours/tiny" in message
    assert message.endswith(INSTEAD)
    assert len(server.asked) == 1


def test_a_hub_that_never_answers_is_not_waited_for(serve, monkeypatch):
    server = serve()
    monkeypatch.setattr(hub, "_ANSWER", 0.05)
    assert "cannot be reached" in refused("silent/one")
    assert len(server.asked) <= 1


def test_a_hub_that_is_there_may_take_its_time(serve, monkeypatch):
    """It answers when its connection stands and the answer, which has a time of its own, is waited for."""
    server = serve({"open_clip_config.json": b"{}"})
    server.awaited.clear()
    limits = []

    class Faults(SimpleQueue):
        def get(self, block=True, timeout=None):
            limits.append(timeout)
            if len(limits) == 2:
                server.awaited.set()
            return super().get(block, timeout)

    monkeypatch.setattr(hub, "SimpleQueue", Faults)
    assert hub.fetch("ours/tiny", "open_clip_config.json", instead=INSTEAD).read_text() == "{}"
    assert limits == [hub._PATIENCE, hub._ANSWER]


def test_a_name_that_is_looked_up_without_end_is_not_waited_for(serve, monkeypatch):
    server, found = serve(), threading.Event()
    monkeypatch.setattr(hub, "_PATIENCE", 0.05)
    monkeypatch.setattr(hub, "_ANSWER", 3600.0)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: found.wait(120) and [])
        assert "cannot be reached (no connection within 0.05 s)" in refused()
    found.set()
    assert server.asked == []


@pytest.mark.parametrize("name", ["http_proxy", "all_proxy"])
def test_behind_a_proxy_it_is_the_proxy_that_must_be_there(serve, monkeypatch, name):
    server = serve(status=503)
    for other in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, server.address)
    elsewhere = "http://hub.invalid/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", elsewhere)
    huggingface_hub.close_session()  # it read the proxies of before
    try:
        assert "cannot be reached (status 503)" in refused()
    finally:
        huggingface_hub.close_session()
    assert server.asked == ["HEAD http://hub.invalid/ours/tiny/resolve/main/open_clip_config.json"]


def test_a_hub_that_needs_no_proxy_is_asked_without(serve, monkeypatch):
    serve({"open_clip_config.json": b"{}"})
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert hub.fetch("ours/tiny", "open_clip_config.json", instead=INSTEAD).read_text() == "{}"


def test_no_hub_at_all_is_asked_for_once(serve, monkeypatch):
    address = serve().address
    closed = address.rpartition(":")[0] + ":9"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", closed + "/{repo_id}/{revision}/{filename}")
    asked, connect = [], socket.create_connection

    def counted(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        return connect(*arguments, **options)

    monkeypatch.setattr(socket, "create_connection", counted)
    assert "cannot be reached (" in refused()
    assert len(asked) == 1


def test_offline_nothing_is_asked(serve, monkeypatch):
    server = serve({"open_clip_config.json": b"{}"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused()
    assert "HF_HUB_OFFLINE" in message
    assert message.endswith(INSTEAD)
    assert server.asked == []


@pytest.mark.parametrize("name", ["/no/such/directory", "./here", "a/b/c", "hf-hub:", "../up"])
def test_what_is_no_name_of_a_repository_is_not_asked_for(serve, name):
    server = serve()
    assert refused(name).startswith(f"{name} is neither here nor a name on the hub")
    assert server.asked == []


def folder():
    beside = ("tokenizer_config.json", "vocab.txt")
    return hub.fetch_folder("hf-hub:ours/tiny", "tokenizer.json", beside=beside, instead=INSTEAD)


def test_a_folder_is_fetched_once_with_what_lies_beside(serve):
    server = serve({"tokenizer.json": b"{}", "tokenizer_config.json": b"[]", "weights.bin": b"x"})
    found = folder()
    assert {path.name for path in found.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    server.asked.clear()
    assert folder() == found
    assert server.asked == []


def test_a_folder_without_what_makes_it_one(serve):
    serve({"tokenizer_config.json": b"[]"})
    with pytest.raises(UserError, match=r"ours/tiny on the hub gives no tokenizer\.json \(.+name a local"):
        folder()
